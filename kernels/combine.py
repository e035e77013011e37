"""Combine: the outputs of a token's experts, already stored at its rank, summed over top-k in a fixed order.

The down-projection stores finished rows straight into [token, k] of the owner's slot (experts.py), so the sum here is
the same whatever the number of ranks: position 0 first, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .machine import INTERPRETED
from .protocol import (
    COMBINE_ARRIVAL,
    COMBINE_CREDIT,
    COMBINE_ROWS,
    COMBINE_SCALARS,
    MAX_TOKENS,
    announce,
    is_alive,
    own_region,
    slot_of,
    wait_arrival,
)

BLOCK_TOKENS = 128 if INTERPRETED else 16
BLOCK_HIDDEN = 128


@triton.jit(do_not_specialize=["tokens"])
def _sum_over_top_k(
    context, ticket, experts, weights, result, tokens,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    in_range = token < tokens
    mask = in_range[:, None] & (column < HIDDEN)[None, :]
    slot_rows = own_region(context, COMBINE_ROWS, result.dtype.element_ty)
    first = (slot_of(context, ticket) * tl.load(context + MAX_TOKENS) + token) * TOP_K
    total = tl.zeros((BLOCK_TOKENS, BLOCK_HIDDEN), tl.float32)
    for k in range(TOP_K):
        routed = tl.load(experts + token * TOP_K + k, mask=in_range, other=-1) >= 0
        value = tl.load(
            slot_rows + (first + k)[:, None] * HIDDEN + column[None, :], mask=mask & routed[:, None], other=0.0
        ).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * TOP_K + k, mask=routed, other=0.0)[:, None]
        total += value
    total = tl.where(is_alive(context), total, float("nan"))
    tl.store(result + token[:, None] * HIDDEN + column[None, :], total.to(result.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["entries"])
def _take_scalars(context, ticket, experts, result, entries, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = entry < entries
    routed = tl.load(experts + entry, mask=in_range, other=-1) >= 0
    first = slot_of(context, ticket) * tl.load(context + MAX_TOKENS) * TOP_K
    value = tl.load(own_region(context, COMBINE_SCALARS, tl.float32) + first + entry, mask=routed, other=0.0)
    tl.store(result + entry, tl.where(is_alive(context), value, float("nan")), mask=in_range)


def combine(
    context: Tensor,
    ticket: Tensor,
    world: int,
    experts: Tensor,
    weights: Tensor | None,
    hidden: int,
    dtype: torch.dtype,
) -> Tensor:
    """Wait for every rank's rows and sum those of each token.

    experts: [T, K] int32 global ids, -1 for not routed. weights: [T, K] float32, or None for a plain sum.
    Returns [T, H]; all NaN once the context has failed. The slot stays in use until ``release``.
    """
    tokens, top_k = experts.shape
    result = torch.empty(tokens, hidden, dtype=dtype, device=context.device)
    wait_arrival(context, ticket, world, COMBINE_ARRIVAL)
    _sum_over_top_k[(max(triton.cdiv(tokens, BLOCK_TOKENS), 1), triton.cdiv(hidden, BLOCK_HIDDEN))](
        context, ticket, experts, weights, result, tokens,
        HIDDEN=hidden, TOP_K=top_k, WEIGHTED=weights is not None, BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_HIDDEN=BLOCK_HIDDEN,
    )  # fmt: skip
    return result


def take_weight_gradients(context: Tensor, ticket: Tensor, experts: Tensor) -> Tensor:
    """Gradients of the router weights [T, K] float32, after ``combine`` has waited."""
    result = torch.empty(experts.shape, dtype=torch.float32, device=context.device)
    entries = experts.numel()
    block = 1024
    _take_scalars[(max(triton.cdiv(entries, block), 1),)](
        context, ticket, experts, result, entries, TOP_K=experts.shape[1], BLOCK=block
    )
    return result


def release(context: Tensor, ticket: Tensor, world: int) -> None:
    """Give the combine slot of this round back to its writers."""
    announce(context, ticket, world, COMBINE_CREDIT)
