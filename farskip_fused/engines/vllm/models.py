"""vLLM's models with FarSkip connectivity: the stock ones, whose decoder layers are rewired when they are built."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from vllm.model_executor.models.llama4 import Llama4ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from farskip_fused.engines.vllm.layers import wire
from farskip_fused.errors import UsageError


class FarSkipModel:
    """The behaviour of a converted model, mixed into a stock one. Loading, attention and caches are the stock one's."""

    model: nn.Module

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        wire(self.model, vllm_config)


class FarSkipDeepseekV2ForCausalLM(FarSkipModel, DeepseekV2ForCausalLM):
    pass


class FarSkipDeepseekV3ForCausalLM(FarSkipModel, DeepseekV3ForCausalLM):
    """Moonlight's checkpoints, too."""


class FarSkipLlama4ForCausalLM(FarSkipModel, Llama4ForCausalLM):
    pass


class FarSkipQwen3MoeForCausalLM(FarSkipModel, Qwen3MoeForCausalLM):
    pass


def check(vllm_config: VllmConfig) -> None:
    """UsageError for what FarSkip models do not run with in vLLM."""
    parallel: Any = vllm_config.parallel_config
    config = vllm_config.model_config.hf_config
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    refused = {
        "pipeline parallelism; use tensor or data parallelism (--pipeline-parallel-size 1)": (
            parallel.pipeline_parallel_size > 1
        ),
        "dual-batch overlap, which FarSkip makes unnecessary; leave out --enable-dbo": parallel.enable_dbo,
        "sequence-parallel experts, which vLLM chooses for tensor and data parallelism together; use one of them": (
            parallel.use_sequence_parallel_moe
        ),
        "float16, for which vLLM rescales the residual stream; pass --dtype bfloat16": (
            dtype == "float16" and getattr(config, "routed_scaling_factor", 1.0) != 1.0
        ),
        "quantised weights; serve the checkpoint in bfloat16": vllm_config.quant_config is not None,
    }
    reason = next((reason for reason, applies in refused.items() if applies), None)
    if reason is not None:
        raise UsageError(f"A FarSkip model does not run in vLLM with {reason}.")
