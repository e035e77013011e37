"""Dispatch: rows from the rank of their token to the ranks of its experts, once per rank.

The sender stores rows straight into the slot of this round at each destination (push). Their place there follows from
their rank and token alone, so no exchange of counts comes first. It sends in the order in which the receivers' GEMMs
want them: the first expert of every rank, its own rank first and each rank starting with another, then the second.
Every row raises a flag of its own when it is there, so that a GEMM can start on its first rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import put
from .layout import LARGEST_CHUNK, Layout, block_entries_of, entry_sizes, local_layout, new_block_counts, sort_received
from .machine import INTERPRETED, padded
from .protocol import (
    CODE_EXPERT_OUT_OF_RANGE,
    DISPATCH_COUNTS,
    DISPATCH_CREDIT,
    DISPATCH_EXPERTS,
    DISPATCH_ROWS,
    DISPATCH_SCALES,
    DISPATCH_WEIGHTS,
    MAX_TOKENS,
    PEERS,
    RANK,
    ROUTING_ARRIVAL,
    ROW_ARRIVAL,
    ROWS_ARRIVAL,
    TICKET_FIRST_ROW,
    WORLD,
    Round,
    announce,
    fail,
    is_alive,
    own_region,
    pace,
    region,
    row_pointers,
    slot_of,
    wait_arrival,
    wait_credit,
)

SCALE_COLUMNS = 128  # columns of an fp8 row that share a scale
FP8_LARGEST = 448.0  # of e4m3
_SCALE_COLUMNS, _FP8_LARGEST = tl.constexpr(SCALE_COLUMNS), tl.constexpr(FP8_LARGEST)
ROUTING_BLOCK = 8192 if INTERPRETED else 1024  # the interpreter pays by the program, not by the row
ROWS_AT_ONCE = 128 if INTERPRETED else 32
COLUMNS_AT_ONCE = 1024
WARPS = 16  # one program fills a multiprocessor's share of loads in flight


class SendOrder(NamedTuple):
    """In which order this rank's rows leave.

    experts: [T, K] int32 global ids. order: [T * K] int32 entries in sending order. entries: [1] int32, how many.
    """

    experts: Tensor
    order: Tensor
    entries: Tensor


class Received(NamedTuple):
    """The routing of the rows that a rank has a slot for; row ``r`` is token ``r % max_tokens`` of rank
    ``r // max_tokens``.

    experts: [R, K] int32 local ids, -1 for elsewhere or for no row. weights: [R, K] float32, undefined there.
    """

    experts: Tensor
    weights: Tensor


@triton.jit(do_not_specialize=["entries"])
def _push_routing(
    context, ticket, experts, weights, keys, entries,
    NUM_LOCAL_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, peer = tl.program_id(0), tl.program_id(1)
    world, rank = tl.load(context + WORLD), tl.load(context + RANK)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    in_range = entry < entries
    expert = tl.load(experts + entry, mask=in_range, other=-1)
    if peer == 0:
        wrong = (expert < -1) | (expert >= NUM_LOCAL_EXPERTS * world)
        if tl.max(wrong.to(tl.int32)) > 0:
            zero = tl.full((), 0, tl.int64)
            seen = tl.max(tl.where(wrong, expert, -2147483648)).to(tl.int64)
            fail(context, CODE_EXPERT_OUT_OF_RANGE, zero, zero, zero, NUM_LOCAL_EXPERTS * world, seen)
        turn = (expert // NUM_LOCAL_EXPERTS - rank + world) % world
        key = (expert % NUM_LOCAL_EXPERTS) * world + turn
        tl.store(keys + entry, tl.where((expert >= 0) & ~wrong, key, -1).to(tl.int32), mask=in_range)
    if is_alive(context) & (tl.load(context + PEERS + peer) != 0):
        source = slot_of(context, ticket) * world + rank
        there = source * tl.load(context + MAX_TOKENS) * TOP_K + entry
        tl.store(region(context, peer, DISPATCH_EXPERTS, tl.int32) + there, expert, mask=in_range)
        weight = tl.load(weights + entry, mask=in_range)
        tl.store(region(context, peer, DISPATCH_WEIGHTS, tl.float32) + there, weight, mask=in_range)
        if block == 0:
            tl.store(region(context, peer, DISPATCH_COUNTS, tl.int32) + source, entries // TOP_K)


@triton.jit
def _push_rows(
    context, ticket, rows, experts, order, entries,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, NUM_LOCAL_EXPERTS: tl.constexpr,
    PLANE: tl.constexpr, FP8: tl.constexpr, PACED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    if is_alive(context):
        rank = tl.load(context + RANK)
        first_row = tl.load(ticket + TICKET_FIRST_ROW + PLANE) + rank * tl.load(context + MAX_TOKENS)
        epoch = tl.load(ticket).to(tl.int32)
        total = tl.load(entries)
        k = tl.arange(0, TOP_K_PADDED)
        element: tl.constexpr = tl.float8e4nv if FP8 else rows.dtype.element_ty
        # A slot has room for wide rows; narrow ones start where those would, or the slots of two rounds would overlap.
        NARROWING: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // element.primitive_bitwidth
        SCALES: tl.constexpr = BLOCK_HIDDEN // _SCALE_COLUMNS
        SCALES_PER_ROW: tl.constexpr = (HIDDEN + _SCALE_COLUMNS - 1) // _SCALE_COLUMNS
        for start in range(tl.program_id(0) * BLOCK_ROWS, total, tl.num_programs(0) * BLOCK_ROWS):
            place = start + tl.arange(0, BLOCK_ROWS)
            in_range = place < total
            entry = tl.load(order + place, mask=in_range, other=0)
            token = (entry // TOP_K).to(tl.int64)
            expert = tl.load(experts + entry, mask=in_range, other=0)
            peer = expert // NUM_LOCAL_EXPERTS
            # The token's first expert at a rank sends the row; its others there find it.
            exists = in_range[:, None] & (k < TOP_K)[None, :]
            other = tl.load(experts + token[:, None] * TOP_K + k[None, :], mask=exists, other=-1)
            at_peer = (other >= 0) & (other // NUM_LOCAL_EXPERTS == peer[:, None])
            leads = in_range & (tl.min(tl.where(at_peer, other, 2147483647), axis=1) == expert)
            row = first_row + token
            # What cannot be stored at a peer is staged where this rank's own rows go, and put from there.
            landing = tl.where(tl.load(context + PEERS + peer) == 0, rank, peer)
            target = row_pointers(context, landing, DISPATCH_ROWS, row, HIDDEN * NARROWING, element)
            for column_start in range(0, HIDDEN, BLOCK_HIDDEN):
                column = column_start + tl.arange(0, BLOCK_HIDDEN)
                mask = leads[:, None] & (column < HIDDEN)[None, :]
                values = tl.load(rows + token[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0)
                if FP8:
                    groups = tl.reshape(values.to(tl.float32), [BLOCK_ROWS, SCALES, _SCALE_COLUMNS])
                    scale = tl.maximum(tl.max(tl.abs(groups), axis=2) / _FP8_LARGEST, 1e-30)
                    values = tl.reshape(groups / scale[:, :, None], [BLOCK_ROWS, BLOCK_HIDDEN])
                    group = column_start // _SCALE_COLUMNS + tl.arange(0, SCALES)
                    scales = row_pointers(context, landing, DISPATCH_SCALES, row, SCALES_PER_ROW, tl.float32)
                    scale_mask = leads[:, None] & (group < SCALES_PER_ROW)[None, :]
                    tl.store(scales[:, None] + group[None, :], scale, mask=scale_mask)
                tl.store(target[:, None] + column[None, :], values.to(element), mask=mask)
            if PACED:
                sent = tl.sum((leads & (landing != rank)).to(tl.int32))
                pace(context, sent * (HIDDEN * element.primitive_bitwidth // 8))
            # All warps' stores come before the flags: the barrier orders them within the program, the release beyond.
            tl.debug_barrier()
            flags = (tl.load(context + PEERS + landing) + tl.load(context + ROW_ARRIVAL)).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(flags + row, tl.zeros_like(entry) + epoch, mask=leads, sem="release", scope="sys")


@triton.jit(do_not_specialize=["entries", "block_entries"])
def _take_routing(
    context, ticket, experts, weights, block_counts, entries, block_entries,
    NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOP_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    first = block * block_entries
    end = tl.minimum(first + block_entries, entries)
    max_tokens, rank = tl.load(context + MAX_TOKENS), tl.load(context + RANK)
    slot = slot_of(context, ticket)
    arrived = own_region(context, DISPATCH_COUNTS, tl.int32) + slot * tl.load(context + WORLD)
    slot_experts = own_region(context, DISPATCH_EXPERTS, tl.int32) + slot * entries
    slot_weights = own_region(context, DISPATCH_WEIGHTS, tl.float32) + slot * entries
    # A failed round computes nothing: its routing may be anything.
    alive = is_alive(context)
    counts = tl.zeros((EXPERTS_PADDED,), tl.int32)
    for start in range(first, end, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        in_range = entry < end
        row = entry // TOP_K
        tokens = tl.load(arrived + row // max_tokens, mask=in_range, other=0)
        exists = in_range & (row % max_tokens < tl.where(alive, tokens, 0))
        expert = tl.load(slot_experts + entry, mask=exists, other=-1) - rank * NUM_EXPERTS
        here = exists & (expert >= 0) & (expert < NUM_EXPERTS)
        expert = tl.where(here, expert, -1).to(tl.int32)
        tl.store(experts + entry, expert, mask=in_range)
        tl.store(weights + entry, tl.load(slot_weights + entry, mask=here), mask=here)
        counts += tl.histogram(tl.maximum(expert, 0), EXPERTS_PADDED, mask=here)
    expert = tl.arange(0, EXPERTS_PADDED)
    tl.store(block_counts + block * NUM_EXPERTS + expert, counts, mask=expert < NUM_EXPERTS)


@triton.jit
def _keep_rows(
    context, ticket, experts, kept,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, FP8: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    rank = tl.load(context + RANK)
    rows = tl.load(context + WORLD) * tl.load(context + MAX_TOKENS)
    first_row = tl.load(ticket + TICKET_FIRST_ROW)
    k = tl.arange(0, TOP_K_PADDED)
    element: tl.constexpr = tl.float8e4nv if FP8 else kept.dtype.element_ty
    NARROWING: tl.constexpr = kept.dtype.element_ty.primitive_bitwidth // element.primitive_bitwidth
    SCALES_PER_ROW: tl.constexpr = (HIDDEN + _SCALE_COLUMNS - 1) // _SCALE_COLUMNS
    for start in range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        exists = (row < rows)[:, None] & (k < TOP_K)[None, :]
        arrived = tl.max(tl.load(experts + row[:, None] * TOP_K + k[None, :], mask=exists, other=-1), axis=1) >= 0
        source = row_pointers(context, rank, DISPATCH_ROWS, first_row + row, HIDDEN * NARROWING, element)
        for column_start in range(0, HIDDEN, BLOCK_HIDDEN):
            column = column_start + tl.arange(0, BLOCK_HIDDEN)
            mask = arrived[:, None] & (column < HIDDEN)[None, :]
            values = tl.load(source[:, None] + column[None, :], mask=mask)
            if FP8:
                scales = row_pointers(context, rank, DISPATCH_SCALES, first_row + row, SCALES_PER_ROW, tl.float32)
                scale = tl.load(scales[:, None] + (column // _SCALE_COLUMNS)[None, :], mask=mask)
                values = (values.to(tl.float32) * scale).to(kept.dtype.element_ty)
            tl.store(kept + row[:, None] * HIDDEN + column[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _poison(context, wide, narrow, rows, INTERMEDIATE: tl.constexpr, BLOCK: tl.constexpr):
    if not is_alive(context):
        nan = tl.full((BLOCK,), float("nan"), wide.dtype.element_ty)
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            for start in range(0, 2 * INTERMEDIATE, BLOCK):
                column = start + tl.arange(0, BLOCK)
                first = (tl.zeros((), tl.int64) + row) * INTERMEDIATE
                tl.store(wide + 2 * first + column, nan, mask=column < 2 * INTERMEDIATE)
                tl.store(narrow + first + column, nan, mask=column < INTERMEDIATE)


def wait_to_send(round_: Round) -> None:
    """Wait until every reader has released the dispatch slot that this round fills."""
    wait_credit(round_, DISPATCH_CREDIT)


def send_routing(round_: Round, experts: Tensor, weights: Tensor, num_local_experts: int) -> SendOrder:
    """Give every rank the routing of this rank's tokens, and find the order in which their rows leave.

    experts: [T, K] int32 global ids, -1 for not routed; an id out of range fails the context. weights: [T, K] float32.
    """
    keys = torch.empty_like(experts)
    entries = experts.numel()
    _push_routing[(max(triton.cdiv(entries, ROUTING_BLOCK), 1), round_.world)](
        round_.context, round_.ticket, experts, weights, keys, entries,
        NUM_LOCAL_EXPERTS=num_local_experts, TOP_K=experts.shape[1], BLOCK=ROUTING_BLOCK,
    )  # fmt: skip
    if round_.puts is not None:
        put.put_routing(round_, entries, experts.shape[1])
    announce(round_, ROUTING_ARRIVAL)
    where = local_layout(keys, round_.world * num_local_experts, tile_rows=1024, one_variant=True)
    return SendOrder(experts, where.order, where.offsets[-1:])


def send_rows(
    round_: Round, rows: Tensor, send: SendOrder, num_local_experts: int,
    *, plane: int = 0, fp8: bool = False,
) -> None:  # fmt: skip
    """Bring rows [T, H] to the ranks of their experts and announce them; the slot must be free.

    plane: which of a token's rows in this round. fp8: as e4m3, with a scale for each 128 columns.
    """
    hidden, top_k = rows.shape[1], send.experts.shape[1]
    _push_rows[(round_.programs,)](
        round_.context, round_.ticket, rows, *send,
        HIDDEN=hidden, TOP_K=top_k, TOP_K_PADDED=padded(top_k), NUM_LOCAL_EXPERTS=num_local_experts,
        PLANE=plane, FP8=fp8, PACED=round_.paced, BLOCK_ROWS=ROWS_AT_ONCE, BLOCK_HIDDEN=_columns_at_once(hidden),
        num_warps=WARPS,
    )  # fmt: skip
    if round_.puts is not None:
        stride = hidden * rows.itemsize
        scale_bytes = 4 * triton.cdiv(hidden, SCALE_COLUMNS) if fp8 else 0
        put.put_rows(round_, *send, num_local_experts, plane, stride, hidden if fp8 else stride, scale_bytes)
    announce(round_, ROWS_ARRIVAL, plane)


def receive_routing(
    round_: Round, max_tokens: int, top_k: int, num_local_experts: int, capacity: int, tile_rows: int
) -> tuple[Received, Layout]:
    """Wait for the routing of every rank, take it out of the slot and sort the entries of this rank's experts.

    capacity: entries at most; more fail the context.
    """
    device = round_.context.device
    experts = torch.empty(round_.world * max_tokens, top_k, dtype=torch.int32, device=device)
    weights = torch.empty(round_.world * max_tokens, top_k, dtype=torch.float32, device=device)
    block_entries = block_entries_of(experts.numel())
    block_counts = new_block_counts(experts, block_entries, num_local_experts)
    wait_arrival(round_, ROUTING_ARRIVAL)
    _take_routing[(block_counts.shape[0],)](
        round_.context, round_.ticket, experts, weights, block_counts, experts.numel(), block_entries,
        **entry_sizes(num_local_experts), TOP_K=top_k, CHUNK=LARGEST_CHUNK, num_warps=8,
    )  # fmt: skip
    layout = sort_received(round_.context, experts, block_counts, block_entries, capacity, tile_rows)
    return Received(experts, weights), layout


def wait_rows(round_: Round, plane: int = 0) -> None:
    """Wait until all rows of this round are in the slot."""
    wait_arrival(round_, ROWS_ARRIVAL, plane)


def keep_rows(round_: Round, experts: Tensor, kept: Tensor, *, fp8: bool = False) -> None:
    """Copy the rows of the slot into ``kept`` [R, H], after ``wait_rows``; rows that did not come are left alone.

    experts: [R, K] of ``Received``. fp8: the rows travelled as e4m3, and are widened.
    """
    hidden, top_k = kept.shape[1], experts.shape[1]
    _keep_rows[(round_.programs,)](
        round_.context, round_.ticket, experts, kept,
        HIDDEN=hidden, TOP_K=top_k, TOP_K_PADDED=padded(top_k), FP8=fp8,
        BLOCK_ROWS=ROWS_AT_ONCE // 2, BLOCK_HIDDEN=_columns_at_once(hidden), num_warps=WARPS,
    )  # fmt: skip


def release(round_: Round) -> None:
    """Give the dispatch slot of this round back to its writers."""
    announce(round_, DISPATCH_CREDIT)


def poison_if_failed(context: Tensor, gate_up_gradient: Tensor, weighted_activation: Tensor) -> None:
    """Fill [C, 2I] and [C, I] with NaN in a failed context: what did not arrive must not pass for a gradient."""
    rows, intermediate = weighted_activation.shape
    _poison[(8 if INTERPRETED else 128,)](
        context, gate_up_gradient, weighted_activation, rows, INTERMEDIATE=intermediate, BLOCK=1024, num_warps=4
    )


def _columns_at_once(hidden: int) -> int:
    return max(min(padded(hidden), COLUMNS_AT_ONCE), SCALE_COLUMNS)
