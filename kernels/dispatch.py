"""Dispatch: rows from the rank of their token to the ranks of its experts, once per rank.

The sender stores rows straight into the slot of this round at each destination (push: the row's place there is known
from the local layout alone, so no count exchange comes first). The receiver copies them out of the slot into memory
of its own, which backward needs in any case, and gives the slot back at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .machine import INTERPRETED, padded
from .protocol import (
    DISPATCH_ARRIVAL,
    DISPATCH_COUNTS,
    DISPATCH_CREDIT,
    DISPATCH_EXPERTS,
    DISPATCH_ROWS,
    DISPATCH_TOKENS,
    DISPATCH_WEIGHTS,
    MAX_TOKENS,
    RANK,
    WORLD,
    announce,
    is_alive,
    own_region,
    region,
    slot_of,
    wait_arrival,
    wait_credit,
)

BLOCK_ROWS = 128 if INTERPRETED else 16  # the interpreter pays by the program, not by the row
BLOCK_HIDDEN = 256


class Received(NamedTuple):
    """Rows that a rank holds after dispatch; row ``r`` came from rank ``r // rows_per_source``.

    rows [R, H]; experts [R, K] int32 local ids, -1 for elsewhere; tokens [R] int32 indices at the source;
    weights [R, K] float32; counts [world] int32 valid rows of each source. Rows past the counts are undefined.
    """

    rows: Tensor
    experts: Tensor
    tokens: Tensor
    weights: Tensor
    counts: Tensor


@triton.jit
def _source_base(context, ticket, source):
    """Index of the first row of ``source`` in this round's slot, in rows."""
    return (slot_of(context, ticket) * tl.load(context + WORLD) + source) * tl.load(context + MAX_TOKENS)


@triton.jit(do_not_specialize=["tokens"])
def _push_rows(
    context, ticket, rows, positions, tokens,
    HIDDEN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    peer = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if is_alive(context):
        world = tl.load(context + WORLD)
        position = tl.load(positions + token * world + peer, mask=token < tokens, other=-1)
        wanted = position >= 0
        target = region(context, peer, DISPATCH_ROWS, rows.dtype.element_ty)
        row = _source_base(context, ticket, tl.load(context + RANK)) + position
        for start in range(0, HIDDEN, BLOCK_HIDDEN):
            column = start + tl.arange(0, BLOCK_HIDDEN)
            mask = wanted[:, None] & (column < HIDDEN)[None, :]
            values = tl.load(rows + token[:, None] * HIDDEN + column[None, :], mask=mask)
            tl.store(target + row[:, None] * HIDDEN + column[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _push_routing(
    context, ticket, experts, weights, positions, counts, tokens,
    NUM_LOCAL_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    peer = tl.program_id(1)
    block = tl.program_id(0)
    token = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if is_alive(context):
        world = tl.load(context + WORLD)
        rank = tl.load(context + RANK)
        position = tl.load(positions + token * world + peer, mask=token < tokens, other=-1)
        wanted = position >= 0
        row = _source_base(context, ticket, rank) + position
        k = tl.arange(0, TOP_K_PADDED)
        mask = wanted[:, None] & (k < TOP_K)[None, :]
        at = token[:, None] * TOP_K + k[None, :]
        expert = tl.load(experts + at, mask=mask, other=-1)
        local = tl.where((expert >= 0) & (expert // NUM_LOCAL_EXPERTS == peer), expert % NUM_LOCAL_EXPERTS, -1)
        there = row[:, None] * TOP_K + k[None, :]
        tl.store(region(context, peer, DISPATCH_EXPERTS, tl.int32) + there, local, mask=mask)
        weight = tl.load(weights + at, mask=mask)
        tl.store(region(context, peer, DISPATCH_WEIGHTS, tl.float32) + there, weight, mask=mask)
        tl.store(region(context, peer, DISPATCH_TOKENS, tl.int32) + row, token.to(tl.int32), mask=wanted)
        if block == 0:
            count = region(context, peer, DISPATCH_COUNTS, tl.int32) + slot_of(context, ticket) * world + rank
            tl.store(count, tl.load(counts + peer))


@triton.jit(do_not_specialize=["rows_per_source"])
def _copy_rows(
    context, ticket, counts, rows, rows_per_source,
    HIDDEN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    source = tl.program_id(1)
    position = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    arrived = position < tl.load(counts + source)
    taken = _source_base(context, ticket, source) + position
    kept = source.to(tl.int64) * rows_per_source + position
    slot_rows = own_region(context, DISPATCH_ROWS, rows.dtype.element_ty)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        column = start + tl.arange(0, BLOCK_HIDDEN)
        mask = arrived[:, None] & (column < HIDDEN)[None, :]
        values = tl.load(slot_rows + taken[:, None] * HIDDEN + column[None, :], mask=mask)
        # What did not arrive must not pass for a gradient.
        values = tl.where(is_alive(context), values, float("nan")).to(rows.dtype.element_ty)
        tl.store(rows + kept[:, None] * HIDDEN + column[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["rows_per_source"])
def _copy_routing(
    context, ticket, counts, experts, tokens, weights, rows_per_source,
    TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    source = tl.program_id(1)
    block = tl.program_id(0)
    position = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    slot_count = own_region(context, DISPATCH_COUNTS, tl.int32) + slot_of(context, ticket) * tl.load(context + WORLD)
    count = tl.where(is_alive(context), tl.load(slot_count + source), 0)
    if block == 0:
        tl.store(counts + source, count)
    arrived = position < count
    taken = _source_base(context, ticket, source) + position
    kept = source.to(tl.int64) * rows_per_source + position
    tl.store(tokens + kept, tl.load(own_region(context, DISPATCH_TOKENS, tl.int32) + taken, mask=arrived), mask=arrived)
    k = tl.arange(0, TOP_K_PADDED)
    mask = arrived[:, None] & (k < TOP_K)[None, :]
    there = taken[:, None] * TOP_K + k[None, :]
    here = kept[:, None] * TOP_K + k[None, :]
    tl.store(experts + here, tl.load(own_region(context, DISPATCH_EXPERTS, tl.int32) + there, mask=mask), mask=mask)
    tl.store(weights + here, tl.load(own_region(context, DISPATCH_WEIGHTS, tl.float32) + there, mask=mask), mask=mask)


def send_rows(context: Tensor, ticket: Tensor, rows: Tensor, positions: Tensor) -> None:
    """Store rows [T, H] at the ranks that ``positions`` [T, world] names; the slot must be free."""
    tokens, hidden = rows.shape
    world = positions.shape[1]
    grid = (max(triton.cdiv(tokens, BLOCK_ROWS), 1), world)
    _push_rows[grid](
        context, ticket, rows, positions, tokens, HIDDEN=hidden, BLOCK_ROWS=BLOCK_ROWS, BLOCK_HIDDEN=BLOCK_HIDDEN
    )


def dispatch_send(
    context: Tensor,
    ticket: Tensor,
    rows: Tensor,
    experts: Tensor,
    weights: Tensor,
    positions: Tensor,
    counts: Tensor,
    num_local_experts: int,
) -> None:
    """Send rows [T, H] with their routing (experts [T, K] int32, weights [T, K] float32) and announce them."""
    tokens, top_k = experts.shape
    world = counts.shape[0]
    wait_credit(context, ticket, world, DISPATCH_CREDIT)
    send_rows(context, ticket, rows, positions)
    _push_routing[(max(triton.cdiv(tokens, BLOCK_ROWS), 1), world)](
        context, ticket, experts, weights, positions, counts, tokens,
        NUM_LOCAL_EXPERTS=num_local_experts, TOP_K=top_k, TOP_K_PADDED=padded(top_k), BLOCK_ROWS=BLOCK_ROWS,
    )  # fmt: skip
    announce(context, ticket, world, DISPATCH_ARRIVAL)


def dispatch_receive(
    context: Tensor, ticket: Tensor, world: int, rows_per_source: int, hidden: int, top_k: int, dtype: torch.dtype
) -> Received:
    """Wait for every source and take its rows out of the slot."""
    device = context.device
    total = world * rows_per_source
    received = Received(
        rows=torch.empty(total, hidden, dtype=dtype, device=device),
        experts=torch.empty(total, top_k, dtype=torch.int32, device=device),
        tokens=torch.empty(total, dtype=torch.int32, device=device),
        weights=torch.empty(total, top_k, dtype=torch.float32, device=device),
        counts=torch.empty(world, dtype=torch.int32, device=device),
    )
    wait_arrival(context, ticket, world, DISPATCH_ARRIVAL)
    grid = (max(triton.cdiv(rows_per_source, BLOCK_ROWS), 1), world)
    _copy_routing[grid](
        context, ticket, received.counts, received.experts, received.tokens, received.weights, rows_per_source,
        TOP_K=top_k, TOP_K_PADDED=padded(top_k), BLOCK_ROWS=BLOCK_ROWS,
    )  # fmt: skip
    _take_rows(context, ticket, received.counts, received.rows, rows_per_source)
    return received


def gradient_send(context: Tensor, ticket: Tensor, rows: Tensor, positions: Tensor) -> None:
    """Send gradients [T, H] along the layout of the forward pass."""
    world = positions.shape[1]
    wait_credit(context, ticket, world, DISPATCH_CREDIT)
    send_rows(context, ticket, rows, positions)
    announce(context, ticket, world, DISPATCH_ARRIVAL)


def gradient_receive(context: Tensor, ticket: Tensor, counts: Tensor, rows_per_source: int, like: Tensor) -> Tensor:
    """Wait for the gradients of the rows ``like`` [R, H], in the same order."""
    rows = torch.empty_like(like)
    wait_arrival(context, ticket, counts.shape[0], DISPATCH_ARRIVAL)
    _take_rows(context, ticket, counts, rows, rows_per_source)
    return rows


def _take_rows(context: Tensor, ticket: Tensor, counts: Tensor, rows: Tensor, rows_per_source: int) -> None:
    world = counts.shape[0]
    grid = (max(triton.cdiv(rows_per_source, BLOCK_ROWS), 1), world)
    _copy_rows[grid](
        context, ticket, counts, rows, rows_per_source,
        HIDDEN=rows.shape[1], BLOCK_ROWS=BLOCK_ROWS, BLOCK_HIDDEN=BLOCK_HIDDEN,
    )  # fmt: skip
    announce(context, ticket, world, DISPATCH_CREDIT)
