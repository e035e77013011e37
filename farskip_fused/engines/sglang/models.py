"""SGLang's models with FarSkip connectivity: the stock ones, whose decoder layers are rewired when they are built."""

from __future__ import annotations

from typing import Any

from sglang.srt.environ import envs
from sglang.srt.models.deepseek_v2 import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM
from sglang.srt.runtime_context import get_server_args
from sglang.srt.utils import cpu_has_amx_support
from torch import nn

from farskip_fused.engines.sglang.layers import wire
from farskip_fused.errors import UsageError


class FarSkipModel:
    """The behaviour of a converted model, mixed into a stock one. Loading, attention and caches are the stock one's."""

    model: nn.Module

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        check(get_server_args(), quant_config)
        super().__init__(config, quant_config, prefix)  # type: ignore[call-arg]
        wire(self.model, config.farskip)


class FarSkipDeepseekV2ForCausalLM(FarSkipModel, DeepseekV2ForCausalLM):
    pass


class FarSkipDeepseekV3ForCausalLM(FarSkipModel, DeepseekV3ForCausalLM):
    """Moonlight's checkpoints, too."""


class FarSkipQwen3MoeForCausalLM(FarSkipModel, Qwen3MoeForCausalLM):
    pass


EntryClass = [FarSkipDeepseekV2ForCausalLM, FarSkipDeepseekV3ForCausalLM, FarSkipQwen3MoeForCausalLM]


def check(args: Any, quant_config: Any) -> None:
    """UsageError for what FarSkip models do not run with in SGLang. args: ServerArgs."""
    refused = {
        "pipeline parallelism; use tensor parallelism (--pp-size 1)": args.pp_size > 1,
        "data-parallel attention; leave out --enable-dp-attention": args.enable_dp_attention,
        "context parallelism; leave out --attn-cp-size": args.attn_cp_size > 1,
        "experts that are exchanged all to all; leave out --moe-a2a-backend": args.moe_a2a_backend != "none",
        "experts in groups of their own; leave out --moe-dp-size and --dwdp-size": (
            args.moe_dp_size > 1 or args.dwdp_size > 1
        ),
        "two- or single-batch overlap, which FarSkip makes unnecessary; leave them out": (
            args.enable_two_batch_overlap or args.enable_single_batch_overlap
        ),
        "scattered attention inputs; leave out --enable-attn-tp-input-scattered": args.enable_attn_tp_input_scattered,
        "dense layers split in another way; leave out --moe-dense-tp-size": args.moe_dense_tp_size is not None,
        "speculative decoding; leave out --speculative-algorithm": args.speculative_algorithm is not None,
        "shared experts fused with routed ones, which FarSkip keeps apart; leave out --enforce-shared-experts-fusion": (
            args.enforce_shared_experts_fusion
        ),
        "a copy of the shared experts on each rank; unset SGLANG_SHARED_EXPERT_TP1": (
            envs.SGLANG_SHARED_EXPERT_TP1.get()
        ),
        "quantised weights; serve the checkpoint in bfloat16": quant_config is not None,
        "SGLang's kernels for AMX, which fuse shared experts with routed ones; serve on a GPU": (
            args.device == "cpu" and cpu_has_amx_support()
        ),
    }
    reason = next((reason for reason, applies in refused.items() if applies), None)
    if reason is not None:
        raise UsageError(f"A FarSkip model does not run in SGLang with {reason}.")
