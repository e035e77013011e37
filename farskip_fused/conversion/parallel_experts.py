"""The experts of a transformers model onto expert parallelism."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import nn

from farskip_fused.conversion.llama4 import Llama4Experts, is_stock
from farskip_fused.conversion.rewiring import moe_blocks
from farskip_fused.errors import UsageError
from farskip_fused.moe import FusedExperts
from farskip_fused.symmetric import SymmetricMemory
from farskip_fused.transformers_experts import check_experts_module, is_experts

Model = TypeVar("Model", bound=nn.Module)


def parallelize(model: Model, symmetric_memory: SymmetricMemory, *, max_tokens: int = 4096) -> Model:
    """Replace the experts of every MoE block by this rank's share of them, in place; returns the model. Collective.

    model: a supported transformers model, stock or converted (Llama-4: converted), with the same weights on every
        rank. Router and shared experts stay as they are.
    max_tokens: most tokens that any rank passes through a layer at once.
    Afterwards a block's ``experts`` is a ``FusedExperts``: parameters ``w13`` and ``w2`` of the local experts, whose
    gradients sum over the tokens of all ranks; those of all other parameters are of this rank's tokens and are yours to
    reduce.
    Raises UsageError, with the model unchanged, if the experts do not divide over the ranks, lie on another device or
    compute something else than the kernels do (another activation than SiLU, biases), or if the model is parallel
    already; TypeError for a dtype without kernels.
    """
    blocks = [cast(Any, block) for _, block in moe_blocks(model)]
    if any(is_stock(block.experts) for block in blocks):
        raise UsageError('Llama-4 must be converted first: ff.convert(model, "standard").')
    if not blocks:
        raise UsageError(f"The {type(model).__name__} has no MoE block to parallelize.")
    for block in blocks:
        _check(block.experts, symmetric_memory)
    fused = [_share(block, symmetric_memory, max_tokens) for block in blocks]
    for block, experts in zip(blocks, fused, strict=True):
        block.experts = experts
        experts.setup()
    cast(Any, model).save_pretrained = _refuse_to_save
    return model


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise UsageError(
        "A parallel model holds this rank's experts only; save_pretrained before parallelize, or save each rank's "
        "state_dict."
    )


def _check(experts: nn.Module, memory: SymmetricMemory) -> None:
    if isinstance(experts, FusedExperts):
        raise UsageError("The model's experts are parallel already; parallelize a model once.")
    if not is_experts(experts):
        raise UsageError(
            f"The experts are {type(experts).__name__}, whose weights have another layout than transformers' own."
        )
    check_experts_module(experts)
    device = cast(torch.Tensor, experts.gate_up_proj).device
    if device != memory.device:
        raise UsageError(f"The experts are on {device} and the symmetric memory is on {memory.device}; move the model.")


def _share(block: Any, memory: SymmetricMemory, max_tokens: int) -> FusedExperts:
    experts = block.experts
    top_k = _top_k(block)
    if isinstance(experts, Llama4Experts):  # a row for each expert of a token
        top_k, max_tokens = 1, top_k * max_tokens
    w13, w2 = experts.gate_up_proj, experts.down_proj
    if experts.is_transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    num_experts, hidden_size, intermediate_size = w2.shape
    share = FusedExperts(
        hidden_size, intermediate_size, num_experts, top_k, ep=memory, max_tokens=max_tokens, dtype=w2.dtype
    )
    for ours, theirs in ((share.w13, w13), (share.w2, w2)):
        with torch.no_grad():
            ours.copy_(theirs.chunk(memory.world)[memory.rank])
    share.w13.requires_grad_(experts.gate_up_proj.requires_grad)
    share.w2.requires_grad_(experts.down_proj.requires_grad)
    return share


def _top_k(block: Any) -> int:
    router = block.router if hasattr(block, "router") else block.gate
    return int(router.top_k if hasattr(router, "top_k") else block.top_k)
