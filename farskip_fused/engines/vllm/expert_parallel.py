"""vLLM's data parallelism with experts on all ranks: this package's dispatch and combine in the place of its own.

vLLM gathers the tokens of all ranks at every rank and sums the outputs back. Here a token goes to the ranks of its
experts alone, the products start on the rows that have arrived, and their results go straight to the token's rank.
Which expert is where, redundant experts included, stays vLLM's choice: its router gives ids of physical experts, and
its map says which of them a rank holds.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_ep_group
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from farskip_fused.checks import check_tokens
from farskip_fused.engines.vllm import all_reduce, ranks, settings
from farskip_fused.errors import UsageError
from farskip_fused.exchange_setup import ExchangeOptions, set_up, warm_up_ids
from farskip_fused.expert_parallel import Pending
from farskip_fused.flight import Exchange
from farskip_fused.kernels.machine import aligned
from farskip_fused.symmetric import SymmetricMemory
from farskip_fused.symmetric.slots import SlotShape


class Experts(NamedTuple):
    """Of one layer. places: [E] int32, where vLLM's physical experts lie, counted rank by rank; None for their ids."""

    exchange: Exchange
    places: Tensor | None


class ExchangingMethod(UnquantizedFusedMoEMethod):
    """vLLM's method of a layer of unquantised experts, with tokens from all ranks and for all ranks.

    A layer's method becomes one by ``exchange_tokens``. It has no ``moe_kernel``: vLLM's interface to those leaves out
    the experts of a rank without tokens, and other ranks' tokens need them.
    leaves_under_way: ``apply`` returns a tensor that will have the output after ``all_reduce.finish``.
    scale: of the output.
    """

    memory: SymmetricMemory
    experts: Experts
    leaves_under_way: bool
    scale: float

    @property
    def supports_internal_mk(self) -> bool:
        """Whether vLLM leaves the tokens where they are."""
        return True

    @property
    def mk_can_overlap_shared_experts(self) -> bool:
        return True

    def process_weights_after_loading(self, layer: Any) -> None:
        """Collective."""
        self.experts = set_up_layer(self.memory, layer)

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The routed experts' output [tokens, hidden] for this rank's tokens, of which there may be none.

        x: [tokens, hidden]; topk_weights, topk_ids: [tokens, K], ids of physical experts, -1 for not routed.
        The shared experts run while tokens travel.
        """
        exchange, places = self.experts
        check_tokens(x.shape[0], exchange.slots.shape.max_tokens)
        if layer.apply_router_weight_on_input:  # one expert a token
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        if places is not None:
            topk_ids = torch.where(topk_ids < 0, -1, places[topk_ids.clamp(min=0).long()])
        pending = Pending(
            exchange, aligned(x), aligned(topk_ids.to(torch.int32)), aligned(topk_weights.float() * self.scale),
            layer.w13_weight, layer.w2_weight,
        )  # fmt: skip
        if shared_experts is not None:
            shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
        if not self.leaves_under_way:
            return pending.finish()
        pending.experts()
        all_reduce.leave(pending.finish)
        return torch.empty_like(x)


def exchange_tokens(method: UnquantizedFusedMoEMethod, vllm_config: VllmConfig) -> None:
    """Makes ``method`` an ``ExchangingMethod`` where ranks of data parallelism share out the experts; collective.

    Raises UsageError where the setting asks for it and it is not to be had.
    """
    parallel = method.moe.moe_parallel_config
    if not parallel.use_ep or parallel.dp_size == 1:
        return
    memory = ranks.ours_or_none(
        "Tokens between the experts' ranks", vllm_config, settings.ALL_TO_ALL, lambda: _memory(method.moe, vllm_config)
    )
    if memory is not None:
        method.__class__ = ExchangingMethod
        exchanging = cast(ExchangingMethod, method)
        exchanging.memory, exchanging.leaves_under_way, exchanging.scale = memory, False, 1.0


def leave_under_way(runner: Any) -> bool:
    """Makes a runner's ``forward`` leave the routed experts' output under way; whether it can."""
    method = runner.routed_experts.quant_method
    # What is sent by puts is on another stream, which a CUDA graph that ends at attention must have joined.
    if not isinstance(method, ExchangingMethod) or method.memory.by_put:
        return False
    method.leaves_under_way = True
    # vLLM would scale what is not there yet.
    method.scale, runner.routed_scaling_factor = runner.routed_scaling_factor, 1.0
    return True


def _memory(moe: FusedMoEConfig, vllm_config: VllmConfig) -> SymmetricMemory:
    parallel, options = moe.moe_parallel_config, vllm_config.parallel_config
    refused = {
        f"{moe.num_experts} experts on {parallel.ep_size} ranks": moe.num_experts % parallel.ep_size > 0,
        "tensor parallelism beside data parallelism": parallel.ep_size != parallel.dp_size,
        f"the all-to-all backend {parallel.all2all_backend}": parallel.all2all_backend != "allgather_reducescatter",
        "dual-batch overlap": options.enable_dbo,
        "elastic expert parallelism": options.enable_elastic_ep,
        "LoRA": moe.is_lora_enabled,
    }
    reason = next((reason for reason, applies in refused.items() if applies), None)
    if reason is not None:
        raise UsageError(f"farskip_fused exchanges no tokens with {reason}; vLLM does.")
    return ranks.symmetric_memory(get_ep_group())


def set_up_layer(memory: SymmetricMemory, layer: Any) -> Experts:
    """Slots, loaded kernels and places for a layer of vLLM's whose weights are there; collective."""
    moe, w13, w2 = layer.moe_config, layer.w13_weight, layer.w2_weight
    shape = SlotShape(moe.max_num_tokens, w13.shape[2], moe.experts_per_token, w13.dtype, staged=memory.by_put)

    @torch.no_grad()
    def warm_up(exchange: Exchange) -> None:
        ids = warm_up_ids(exchange)
        x = torch.zeros(len(ids), shape.hidden_size, dtype=w13.dtype, device=w13.device)
        Pending(exchange, x, ids, torch.ones_like(ids, dtype=torch.float32), w13, w2).finish()

    exchange = set_up(memory, shape, moe.num_experts, ExchangeOptions(), warm_up)
    return Experts(exchange, find_places(memory, layer.expert_map_manager.expert_map))


def find_places(memory: SymmetricMemory, expert_map: Tensor) -> Tensor | None:
    """``Experts.places`` from every rank's map [E] of physical experts to its own, -1 for those of others; collective.

    Each rank holds equally many.
    """
    maps = torch.tensor(memory.gather(expert_map.tolist()), dtype=torch.int32)
    held_by = (maps >= 0).int().argmax(dim=0)
    places = (held_by * (maps.shape[1] // memory.world) + maps.amax(dim=0)).int()
    if torch.equal(places, torch.arange(len(places), dtype=torch.int32)):
        return None
    return places.to(memory.device)
