"""The expert kernels under vLLM's fused MoE layer, for FarSkip and stock models.

vLLM routes, moves tokens between ranks and sums over them as it does for its own kernels; these are one more
implementation of its modular interface. On CPU the torch reference takes their place, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from farskip_fused import reference
from farskip_fused.checks import DTYPES
from farskip_fused.engines.vllm import settings
from farskip_fused.engines.vllm.expert_parallel import exchange_tokens
from farskip_fused.errors import UsageError
from farskip_fused.local_experts import compute_experts
from farskip_fused.record import CLASS_PREFIX


class FarSkipExperts(mk.FusedMoEExpertsModular):
    """SwiGLU experts and their weighted sum, [tokens, hidden]; ids that this rank does not hold add nothing."""

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts],
        moe_config: FusedMoEConfig,
        weight_key: Any,
        activation_key: Any,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        if moe_config.has_bias:
            return False, "kernel does not support biases"
        if any(getattr(moe_config, f"swiglu_{name}", None) is not None for name in ("limit", "alpha", "beta")):
            return False, "kernel does not support a clamped SwiGLU"
        if moe_config.in_dtype not in DTYPES:
            return False, f"kernel does not support {moe_config.in_dtype}"
        return mk.FusedMoEExperts.is_supported_config(cls, moe_config, weight_key, activation_key, activation_format)

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cpu() or (current_platform.is_cuda() and current_platform.has_device_capability(80))

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation == MoEActivation.SILU

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    def workspace_shapes(
        self, M: int, N: int, K: int, *args: Any, **kwargs: Any
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduceNoOP:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """w1 [local experts, 2I, hidden], w2 [local experts, hidden, I]; topk_weights, topk_ids [tokens, K]."""
        if apply_router_weight_on_input:  # by whoever prepared the input
            topk_weights = torch.ones_like(topk_weights)
        if hidden_states.is_cuda:
            compute_experts(hidden_states, topk_ids, topk_weights, w1, w2, output, expert_map)
        else:
            if expert_map is not None:
                topk_ids = torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0)])
            output.copy_(reference_experts(hidden_states, topk_ids, topk_weights, w1, w2))


@torch.library.custom_op("farskip_fused::reference_experts", mutates_args=())
def reference_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, w13: Tensor, w2: Tensor
) -> Tensor:
    """An operator, because on CPU vLLM has the whole model compiled, and the reference looks at values."""
    return reference.experts(hidden_states, top_k_index, top_k_weights, w13, w2)


@reference_experts.register_fake
def _(hidden_states: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(hidden_states)


class FarSkipRoutedExperts(RoutedExperts):
    """vLLM's experts of one layer, computed as ever, or by the kernels, where they are wanted."""

    def _get_quant_method(self, *args: Any, **kwargs: Any) -> Any:
        method = super()._get_quant_method(*args, **kwargs)
        vllm_config = get_current_vllm_config()
        wanted = settings.read(vllm_config, settings.EXPERTS)
        if wanted is None:
            wanted = current_platform.is_cuda() and _is_farskip(vllm_config) and reason_against(method) is None
        if wanted:
            reason = reason_against(method)
            if reason is not None:
                raise UsageError(f"{settings.EXPERTS} was asked for, but {reason}; leave it out.")
            # Of vLLM's own kernels those in Triton take the weights as they are loaded, as these do.
            method.unquantized_backend, method.experts_cls = UnquantizedMoeBackend.TRITON, FarSkipExperts
            exchange_tokens(method, vllm_config)
        return method


def reason_against(method: Any) -> str | None:
    """Why the kernels cannot take the place of those that vLLM has chosen; None if they can."""
    if type(method) is not UnquantizedFusedMoEMethod:
        return f"the experts are quantised or otherwise special ({type(method).__name__})"
    chosen = method.experts_cls
    if chosen is None or chosen.is_monolithic():
        return f"vLLM routes and computes experts in one piece here ({method.unquantized_backend.value})"
    return FarSkipExperts.is_supported_config(FarSkipExperts, method.moe, None, None, chosen.activation_format())[1]


def _is_farskip(vllm_config: VllmConfig) -> bool:
    architectures = vllm_config.model_config.architectures if vllm_config.model_config else []
    return any(name.startswith(CLASS_PREFIX) for name in architectures)


def register() -> None:
    """Makes vLLM build ``FarSkipRoutedExperts``; may be called again."""
    if op_registry_oot.get(RoutedExperts.__name__) is not FarSkipRoutedExperts:
        RoutedExperts.register_oot(FarSkipRoutedExperts)
