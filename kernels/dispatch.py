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
from .launchable import Kernel
from .layout import (
    LARGEST_CHUNK,
    Layout,
    block_entries_of,
    entry_sizes,
    load_local_layout,
    local_layout,
    new_block_counts,
    sort_received,
)
from .machine import INTERPRETED, ceil_div, padded
from .protocol import (
    CODE_EXPERT_OUT_OF_RANGE,
    COMBINE_CREDIT,
    DISPATCH_COUNTS,
    DISPATCH_CREDIT,
    DISPATCH_EXPERTS,
    DISPATCH_ROWS,
    DISPATCH_SCALES,
    DISPATCH_WEIGHTS,
    MAX_TOKENS,
    PEERS,
    PUSHED,
    RANK,
    ROUTING_ARRIVAL,
    ROW_ARRIVAL,
    ROWS_ARRIVAL,
    TICKET_FIRST_ROW,
    WORLD,
    Round,
    announce,
    await_flag,
    fail,
    is_alive,
    own_region,
    pace,
    raise_flag,
    region,
    row_pointers,
    slot_of,
    wait_arrival,
    wait_credit,
)
from .put import put_staged_rows, quiet

SCALE_COLUMNS = 128  # columns of an fp8 row that share a scale
FP8_LARGEST = 448.0  # of e4m3
_SCALE_COLUMNS, _FP8_LARGEST = tl.constexpr(SCALE_COLUMNS), tl.constexpr(FP8_LARGEST)
ORDER_TILE_ROWS = 1024  # the order has no use for tiles
ROUTING_BLOCK = 8192 if INTERPRETED else 1024  # the interpreter pays by the program, not by the row
WARPS = 16  # one program fills a multiprocessor's share of loads in flight
# A warp takes a row, in chunks of a 16-byte load a lane; wider blocks would give every thread parts of eight rows, and
# eight times the loads of what belongs to a row. In flight: 64 KB a program.
ROWS_AT_ONCE = 128 if INTERPRETED else WARPS
COLUMNS_OF_CHUNK = 256
CHUNKS_AT_ONCE = 8
FLAG_BATCHES = 4
KEPT_ROWS_AT_ONCE = 128 if INTERPRETED else 16
KEPT_COLUMNS_AT_ONCE = 1024


class SendOrder(NamedTuple):
    """In which order this rank's rows leave.

    experts: [T, K] int32 global ids. order: [T * K] int32 entries in sending order, of those that lead to a rank: each
    token's lowest expert there, with which its row is sent. entries: [1] int32, how many.
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


@Kernel
@triton.jit(do_not_specialize=["entries"])
def _push_routing(
    context, ticket, experts, weights, keys, entries,
    NUM_LOCAL_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, PUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Without PUTS, the last program to finish says that the routing is there."""
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
        # The token's lowest expert at a rank sends the row, its others there find it. The senders' kernels see leading
        # entries alone: half of a batch of all entries would have nothing to send.
        leads = (expert >= 0) & ~wrong
        for k in tl.static_range(TOP_K):
            other = tl.load(experts + entry // TOP_K * TOP_K + k, mask=in_range, other=-1)
            at_peer = (other >= 0) & (other // NUM_LOCAL_EXPERTS == expert // NUM_LOCAL_EXPERTS)
            leads &= ~(at_peer & ((other < expert) | ((other == expert) & (k < entry % TOP_K))))
        turn = (expert // NUM_LOCAL_EXPERTS - rank + world) % world
        key = (expert % NUM_LOCAL_EXPERTS) * world + turn
        tl.store(keys + entry, tl.where(leads, key, -1).to(tl.int32), mask=in_range)
    if is_alive(context) & (tl.load(context + PEERS + peer) != 0):
        source = slot_of(context, ticket) * world + rank
        there = source * tl.load(context + MAX_TOKENS) * TOP_K + entry
        tl.store(region(context, peer, DISPATCH_EXPERTS, tl.int32) + there, expert, mask=in_range)
        weight = tl.load(weights + entry, mask=in_range)
        tl.store(region(context, peer, DISPATCH_WEIGHTS, tl.float32) + there, weight, mask=in_range)
        if block == 0:
            tl.store(region(context, peer, DISPATCH_COUNTS, tl.int32) + source, entries // TOP_K)
        if not PUTS:
            _announce_by_last(context, ticket, tl.num_programs(0) * world, ROUTING_ARRIVAL, 0)


@Kernel
@triton.jit
def _push_rows(
    context, ticket, rows, experts, order, entries,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, NUM_LOCAL_EXPERTS: tl.constexpr,
    PLANE: tl.constexpr, FP8: tl.constexpr, PACED: tl.constexpr, PUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, FLAG_BATCHES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Groups of batches of rows, each row in the hands of one warp, and then the group's flags.

    PUTS: rows for peers that no store reaches are staged and put, a batch at a time. Without any, the last program to
    finish says that all rows are there.
    """
    if is_alive(context):
        rank = tl.load(context + RANK)
        first_row = tl.load(ticket + TICKET_FIRST_ROW + PLANE) + rank * tl.load(context + MAX_TOKENS)
        epoch = tl.load(ticket).to(tl.int32)
        total = tl.load(entries)
        element: tl.constexpr = tl.float8e4nv if FP8 else rows.dtype.element_ty
        # A slot has room for wide rows; narrow ones start where those would, or the slots of two rounds would overlap.
        NARROWING: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // element.primitive_bitwidth
        SCALES_PER_ROW: tl.constexpr = (HIDDEN + _SCALE_COLUMNS - 1) // _SCALE_COLUMNS
        ROW_BYTES: tl.constexpr = HIDDEN * element.primitive_bitwidth // 8
        SCALE_BYTES: tl.constexpr = 4 * SCALES_PER_ROW if FP8 else 0
        # Flags go up for several batches at once: their release waits for every store before it, and costs more than a
        # batch. With few rows every program gets some all the same.
        batches = tl.minimum(tl.maximum(total // (tl.num_programs(0) * BLOCK_ROWS), 1), FLAG_BATCHES)
        groups = tl.cdiv(total, batches * BLOCK_ROWS)
        lane = tl.arange(0, BLOCK_ROWS)
        # Entries and experts are loaded two batches and one batch ahead: their latency lies under that of rows.
        place = _start_of(0, batches, BLOCK_ROWS) + lane
        entry = tl.load(order + place, mask=place < total, other=0)
        expert = tl.load(experts + entry, mask=place < total, other=0)
        place = _start_of(1, batches, BLOCK_ROWS) + lane
        next_entry = tl.load(order + place, mask=place < total, other=0)
        for batch in range(0, tl.cdiv(groups - tl.program_id(0), tl.num_programs(0)) * batches):
            start = _start_of(batch, batches, BLOCK_ROWS)
            in_range = start + lane < total
            token = (entry // TOP_K).to(tl.int64)
            row = first_row + token
            landing = _landing(context, expert // NUM_LOCAL_EXPERTS, rank)
            target = row_pointers(context, landing, DISPATCH_ROWS, row, HIDDEN * NARROWING, element)
            for column_start in tl.static_range(0, HIDDEN, CHUNKS * CHUNK):
                loaded = ()
                for chunk in tl.static_range(CHUNKS):
                    column = column_start + chunk * CHUNK + tl.arange(0, CHUNK)
                    mask = in_range[:, None] & (column < HIDDEN)[None, :]
                    pointers = rows + token[:, None] * HIDDEN + column[None, :]
                    loaded += (tl.load(pointers, mask=mask, other=0.0),)  # type: ignore[assignment]
                if column_start == 0:
                    next_place = _start_of(batch + 1, batches, BLOCK_ROWS) + lane
                    expert = tl.load(experts + next_entry, mask=next_place < total, other=0)
                    entry = next_entry
                    next_place = _start_of(batch + 2, batches, BLOCK_ROWS) + lane
                    next_entry = tl.load(order + next_place, mask=next_place < total, other=0)
                for chunk in tl.static_range(CHUNKS):
                    column = column_start + chunk * CHUNK + tl.arange(0, CHUNK)
                    mask = in_range[:, None] & (column < HIDDEN)[None, :]
                    values = loaded[chunk]  # type: ignore[misc, var-annotated]
                    if FP8:
                        groups_of_row = tl.reshape(
                            values.to(tl.float32), [BLOCK_ROWS, CHUNK // _SCALE_COLUMNS, _SCALE_COLUMNS]
                        )
                        scale = tl.maximum(tl.max(tl.abs(groups_of_row), axis=2) / _FP8_LARGEST, 1e-30)
                        values = tl.reshape(groups_of_row / scale[:, :, None], [BLOCK_ROWS, CHUNK])
                        scale_column = (column_start + chunk * CHUNK) // _SCALE_COLUMNS
                        scale_column += tl.arange(0, CHUNK // _SCALE_COLUMNS)
                        scales = row_pointers(context, landing, DISPATCH_SCALES, row, SCALES_PER_ROW, tl.float32)
                        scale_mask = in_range[:, None] & (scale_column < SCALES_PER_ROW)[None, :]
                        tl.store(scales[:, None] + scale_column[None, :], scale, mask=scale_mask)
                    tl.store(target[:, None] + column[None, :], values.to(element), mask=mask)
            if PUTS:
                put_staged_rows(
                    context, order, experts, start, total, first_row,
                    ROW_BYTES * NARROWING, ROW_BYTES, SCALE_BYTES, TOP_K, NUM_LOCAL_EXPERTS, BLOCK_ROWS,
                )  # fmt: skip
            if batch % batches == batches - 1:
                first = start - (batches - 1) * BLOCK_ROWS
                sent_place = first + tl.arange(0, BLOCK_ROWS * FLAG_BATCHES)
                is_sent = sent_place < tl.minimum(start + BLOCK_ROWS, total)
                sent = tl.load(order + sent_place, mask=is_sent, other=0)
                peer = tl.load(experts + sent, mask=is_sent, other=0) // NUM_LOCAL_EXPERTS
                sent_to = _landing(context, peer, rank)
                if PACED:
                    pace(context, tl.sum((is_sent & (peer != rank)).to(tl.int32)) * (ROW_BYTES + SCALE_BYTES))
                base = tl.load(context + PEERS + sent_to) + tl.load(context + ROW_ARRIVAL)
                flags = base.to(tl.pointer_type(tl.int32)) + first_row + (sent // TOP_K).to(tl.int64)
                # All warps' stores come before the flags: the barrier orders them within the program, the release
                # beyond.
                tl.debug_barrier()
                tl.atomic_xchg(flags, tl.zeros_like(sent) + epoch, mask=is_sent, sem="release", scope="sys")
        if PUTS:
            quiet()
        else:
            _announce_by_last(context, ticket, tl.num_programs(0), ROWS_ARRIVAL, PLANE)


@triton.jit
def _announce_by_last(context, ticket, programs, FLAGS: tl.constexpr, PLANE: tl.constexpr):
    """The last of so many programs to come here raises this rank's flag at all, for what all of them have stored."""
    tl.debug_barrier()
    finished = tl.atomic_add(context + PUSHED, tl.full((), 1, tl.int64), sem="acq_rel", scope="sys")
    if finished == programs - 1:
        tl.store(context + PUSHED, tl.full((), 0, tl.int64))
        for peer in range(0, tl.load(context + WORLD)):
            raise_flag(context, ticket, peer, FLAGS, PLANE)


@triton.jit
def _start_of(batch, batches, BLOCK_ROWS: tl.constexpr):
    """Where a batch of this program's begins: programs take groups of so many batches in turn."""
    group = batch // batches * tl.num_programs(0) + tl.program_id(0)
    return (group * batches + batch % batches) * BLOCK_ROWS


@triton.jit
def _landing(context, peer, rank):
    """Where rows for a peer are stored: what no store brings there is staged where this rank's own rows go."""
    return tl.where(tl.load(context + PEERS + peer) == 0, rank, peer)


@Kernel
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


@Kernel
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


@Kernel
@triton.jit
def _release_arrived(context, ticket, THEN_SEND: tl.constexpr):
    peer = tl.program_id(0).to(tl.int64)
    await_flag(context, ticket, peer, ROWS_ARRIVAL, False, 0)
    if is_alive(context) & (tl.load(context + PEERS + peer) != 0):
        raise_flag(context, ticket, peer, DISPATCH_CREDIT, 0)
    if THEN_SEND:
        await_flag(context, ticket, peer, COMBINE_CREDIT, True, 0)


@Kernel
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
    blocks = max(ceil_div(entries, ROUTING_BLOCK), 1)
    _push_routing[(blocks, round_.world)](
        round_.context, round_.ticket, experts, weights, keys, entries,
        NUM_LOCAL_EXPERTS=num_local_experts, TOP_K=experts.shape[1], PUTS=round_.puts is not None, BLOCK=ROUTING_BLOCK,
    )  # fmt: skip
    if round_.puts is not None:
        put.put_routing(round_, entries, experts.shape[1])
        announce(round_, ROUTING_ARRIVAL)
    where = local_layout(keys, round_.world * num_local_experts, ORDER_TILE_ROWS)
    return SendOrder(experts, where.order, where.offsets[-1:])


def load_orders(device: torch.device, num_experts: int) -> None:
    """Launch every variant of what finds the order of sending, whatever the number of tokens."""
    load_local_layout(device, num_experts, ORDER_TILE_ROWS)


def send_rows(
    round_: Round, rows: Tensor, send: SendOrder, num_local_experts: int,
    *, plane: int = 0, fp8: bool = False,
) -> None:  # fmt: skip
    """Bring rows [T, H] to the ranks of their experts and announce them; the slot must be free.

    plane: which of a token's rows in this round. fp8: as e4m3, with a scale for each 128 columns.
    """
    hidden, top_k = rows.shape[1], send.experts.shape[1]
    chunks_at_once = CHUNKS_AT_ONCE if round_.puts is None else CHUNKS_AT_ONCE // 2  # puts need registers
    chunk = max(min(padded(hidden), COLUMNS_OF_CHUNK), SCALE_COLUMNS)
    _push_rows[(round_.programs,)](
        round_.context, round_.ticket, rows, *send,
        HIDDEN=hidden, TOP_K=top_k, NUM_LOCAL_EXPERTS=num_local_experts,
        PLANE=plane, FP8=fp8, PACED=round_.paced, PUTS=round_.puts is not None,
        BLOCK_ROWS=ROWS_AT_ONCE, FLAG_BATCHES=FLAG_BATCHES, CHUNK=chunk,
        CHUNKS=min(chunks_at_once, ceil_div(hidden, chunk)), num_warps=WARPS, **(round_.puts or {}),
    )  # fmt: skip
    if round_.puts is not None:
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
        BLOCK_ROWS=KEPT_ROWS_AT_ONCE, BLOCK_HIDDEN=max(min(padded(hidden), KEPT_COLUMNS_AT_ONCE), SCALE_COLUMNS),
        num_warps=WARPS,
    )  # fmt: skip


def release(round_: Round) -> None:
    """Give the dispatch slot of this round back to its writers."""
    announce(round_, DISPATCH_CREDIT)


def release_arrived(round_: Round, then_send: bool) -> None:
    """``wait_rows``, ``release`` and, where this stream stores results at their owners next, ``combine.wait_to_send``,
    in one launch with a program for each peer: none of these steps depends on another peer's."""
    _release_arrived[(round_.world,)](round_.context, round_.ticket, THEN_SEND=then_send, num_warps=1)
    if round_.puts is not None:
        put.signal(round_, DISPATCH_CREDIT, 0)


def poison_if_failed(context: Tensor, gate_up_gradient: Tensor, weighted_activation: Tensor) -> None:
    """Fill [C, 2I] and [C, I] with NaN in a failed context: what did not arrive must not pass for a gradient."""
    rows, intermediate = weighted_activation.shape
    _poison[(8 if INTERPRETED else 128,)](
        context, gate_up_gradient, weighted_activation, rows, INTERMEDIATE=intermediate, BLOCK=1024, num_warps=4
    )
