"""Combine: the outputs of a token's experts, brought to its rank and summed in a fixed order.

Two forms fill the same slot. Direct: the down-projection stores every finished row in [token, k] of its owner
(experts_to_owner.py); the sum is over top-k, position 0 first, the same whatever the number of ranks. Pre-summed: each
rank sums its experts' rows of a token first and stores one row in [token, j], where it is the j-th of the token's
ranks; fewer bytes travel, and the sum is over ranks, rank 0 first. Both sum in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import put
from .launchable import Kernel
from .machine import INTERPRETED, ceil_div, padded
from .protocol import (
    COMBINE_ARRIVAL,
    COMBINE_CREDIT,
    COMBINE_ROWS,
    COMBINE_SCALARS,
    COMBINE_STAGED_ROWS,
    COMBINE_STAGED_SCALARS,
    DISPATCH_EXPERTS,
    MAX_TOKENS,
    PEERS,
    RANK,
    WORLD,
    Round,
    announce,
    is_alive,
    own_region,
    pace,
    pointers_at,
    row_pointers,
    slot_of,
    wait_arrival,
    wait_credit,
)
from .put import put_staged_sums, quiet

BLOCK_TOKENS = 128 if INTERPRETED else 1
BLOCK_HIDDEN = 128 if INTERPRETED else 1024
WARPS = 16
# A warp takes a row, in chunks of a 16-byte load a lane, several in flight.
ROWS_AT_ONCE = 128 if INTERPRETED else WARPS
COLUMNS_OF_CHUNK = 256


class Extras(NamedTuple):
    """What combine adds to the sum in the same pass, each [T, H] or None, and the norm it applies to the result.

    norm_weight: [H] of an RMSNorm with ``norm_epsilon``, or None.
    """

    residual: Tensor | None = None
    shared: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_epsilon: float = 0.0


@triton.jit
def _count_ranks(ids, below, NUM_LOCAL_EXPERTS: tl.constexpr):
    """How many ranks below ``below`` hold an expert of each token, from ids [BLOCK, K]."""
    rank = tl.where(ids >= 0, ids // NUM_LOCAL_EXPERTS, 2147483647)
    k = tl.arange(0, ids.shape[1])
    again = (rank[:, :, None] == rank[:, None, :]) & (k[None, None, :] < k[None, :, None])
    first = tl.max(again.to(tl.int32), axis=2) == 0
    return tl.sum((first & (rank < below)).to(tl.int32), axis=1)


@Kernel
@triton.jit(do_not_specialize=["rows"])
def _find_turns(
    context, ticket, experts, turns, rows,
    NUM_LOCAL_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, TOP_K_PADDED)
    entry = row[:, None] * TOP_K + k[None, :]
    mask = (row < rows)[:, None] & (k < TOP_K)[None, :]
    here = tl.max(tl.load(experts + entry, mask=mask, other=-1), axis=1) >= 0
    first = slot_of(context, ticket) * rows * TOP_K
    mask &= here[:, None]
    ids = tl.load(own_region(context, DISPATCH_EXPERTS, tl.int32) + first + entry, mask=mask, other=-1)
    turn = _count_ranks(ids, tl.load(context + RANK), NUM_LOCAL_EXPERTS)
    tl.store(turns + row, tl.where(here, turn, -1), mask=row < rows)


@Kernel
@triton.jit(do_not_specialize=["rows", "rows_in_turn"])
def _push_sums(
    context, ticket, values, places, weights, turns, rows, rows_in_turn,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, TERMS: tl.constexpr, PACED: tl.constexpr, PUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A block of rows at a time, each in the hands of one warp."""
    if is_alive(context):
        max_tokens, rank = tl.load(context + MAX_TOKENS), tl.load(context + RANK)
        slot, own = slot_of(context, ticket), tl.load(context + PEERS + rank)
        first = slot * max_tokens
        NBYTES: tl.constexpr = HIDDEN * values.dtype.element_ty.primitive_bitwidth // 8
        # A program takes several blocks in turn: the cache lines of turns, places and weights that the first one waits
        # for hold those of the others, and that wait is as long as the one for the rows.
        for begin in range(tl.program_id(0) * rows_in_turn, rows, tl.num_programs(0) * rows_in_turn):
            for start in range(begin, begin + rows_in_turn, BLOCK_ROWS):
                row = start + tl.arange(0, BLOCK_ROWS)
                turn = tl.load(turns + row, mask=row < rows, other=-1)
                here = turn >= 0
                # Of a token's experts few live here. Those first, in their order: the loads that are in flight
                # together would otherwise be masked off for the most part.
                listed, listed_factors, turns_of_terms = (), (), ()
                count = tl.zeros((BLOCK_ROWS,), tl.int32)
                for term in tl.static_range(TERMS):
                    entry = row.to(tl.int64) * TERMS + term
                    place = tl.load(places + entry, mask=here, other=-1)
                    listed += (place,)  # type: ignore[assignment]
                    if weights is not None:
                        listed_factors += (tl.load(weights + entry, mask=here, other=0.0),)  # type: ignore[assignment]
                    turns_of_terms += (tl.where(place >= 0, count, -1),)  # type: ignore[assignment]
                    count += (place >= 0).to(tl.int32)
                found, factors = (), ()
                for turn_of_term in tl.static_range(TERMS):
                    place = tl.full((BLOCK_ROWS,), -1, tl.int32)
                    factor = tl.zeros((BLOCK_ROWS,), tl.float32)
                    for term in tl.static_range(turn_of_term, TERMS):
                        is_it = turns_of_terms[term] == turn_of_term  # type: ignore[misc]
                        place = tl.where(is_it, listed[term], place)  # type: ignore[misc]
                        if weights is not None:
                            factor = tl.where(is_it, listed_factors[term], factor)  # type: ignore[misc]
                    found += (place,)  # type: ignore[assignment]
                    factors += (factor,)  # type: ignore[assignment]
                owner = row // max_tokens
                token = ((first + row % max_tokens) * TOP_K).to(tl.int64)
                base = tl.load(context + PEERS + owner, mask=row < rows, other=0)
                there = base + tl.load(context + COMBINE_ROWS) + (token + turn) * NBYTES
                # What cannot be stored at its owner is staged here, and put from there.
                staged = own + tl.load(context + COMBINE_STAGED_ROWS) + (slot * rows + row) * NBYTES
                target = pointers_at(tl.where(base == 0, staged, there), NBYTES, values.dtype.element_ty)
                if PACED:
                    sent = tl.sum((here & (owner != rank)).to(tl.int32))
                for column_start in range(0, HIDDEN, CHUNKS * CHUNK):
                    totals = ()
                    for _ in tl.static_range(CHUNKS):
                        totals += (tl.zeros((BLOCK_ROWS, CHUNK), tl.float32),)  # type: ignore[assignment]
                    for term in tl.static_range(TERMS):
                        source = values + found[term].to(tl.int64) * HIDDEN  # type: ignore[misc]
                        loaded = ()
                        for chunk in tl.static_range(CHUNKS):
                            column = column_start + chunk * CHUNK + tl.arange(0, CHUNK)
                            mask = (found[term] >= 0)[:, None] & (column < HIDDEN)[None, :]  # type: ignore[misc]
                            loaded += (tl.load(source[:, None] + column[None, :], mask=mask, other=0.0),)  # type: ignore[assignment]
                        sums = ()
                        for chunk in tl.static_range(CHUNKS):
                            value = loaded[chunk].to(tl.float32)  # type: ignore[misc]
                            if weights is not None:
                                sums += (tl.fma(value, factors[term][:, None], totals[chunk]),)  # type: ignore[assignment, misc]
                            else:
                                sums += (totals[chunk] + value,)  # type: ignore[assignment, misc]
                        totals = sums
                    for chunk in tl.static_range(CHUNKS):
                        column = column_start + chunk * CHUNK + tl.arange(0, CHUNK)
                        mask = here[:, None] & (column < HIDDEN)[None, :]
                        total = totals[chunk].to(values.dtype.element_ty)  # type: ignore[misc, var-annotated]
                        tl.store(target[:, None] + column[None, :], total, mask=mask)
                if PUTS:
                    put_staged_sums(context, turns, slot, start, rows, NBYTES, TOP_K, BLOCK_ROWS)
                if PACED:
                    pace(context, sent * NBYTES)
        if PUTS:
            quiet()


@Kernel
@triton.jit(do_not_specialize=["tokens"])
def _sum(
    context, ticket, experts, weights, shared, residual, norm_weight, norm_epsilon, result, normed, tokens,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, PRESUMMED_BY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    in_range = token < tokens
    in_row = column < HIDDEN
    mask = in_range[:, None] & in_row[None, :]
    first = (slot_of(context, ticket) * tl.load(context + MAX_TOKENS) + token) * TOP_K
    rows = row_pointers(context, tl.load(context + RANK), COMBINE_ROWS, first, HIDDEN, result.dtype.element_ty)
    if PRESUMMED_BY > 0:
        k = tl.arange(0, TOP_K_PADDED)
        ids_mask = in_range[:, None] & (k < TOP_K)[None, :]
        ids = tl.load(experts + token[:, None] * TOP_K + k[None, :], mask=ids_mask, other=-1)
        ranks = _count_ranks(ids, tl.load(context + WORLD), PRESUMMED_BY)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_HIDDEN), tl.float32)
    for k in tl.static_range(TOP_K):
        if PRESUMMED_BY > 0:
            arrived = in_range & (k < ranks)
        else:
            arrived = tl.load(experts + token * TOP_K + k, mask=in_range, other=-1) >= 0
        value = tl.load(
            rows[:, None] + (k * HIDDEN + column)[None, :], mask=arrived[:, None] & in_row[None, :], other=0.0
        ).to(tl.float32)
        if weights is not None:
            router_weight = tl.load(weights + token * TOP_K + k, mask=arrived, other=0.0)
            total = tl.fma(value, router_weight[:, None], total)
        else:
            total += value
    at = token[:, None] * HIDDEN + column[None, :]
    # Rounded after every addition, so that the result is bit for bit that of separate additions.
    element = result.dtype.element_ty
    total = total.to(element)
    if shared is not None:
        total = (total.to(tl.float32) + tl.load(shared + at, mask=mask, other=0.0).to(tl.float32)).to(element)
    if residual is not None:
        total = (tl.load(residual + at, mask=mask, other=0.0).to(tl.float32) + total.to(tl.float32)).to(element)
    total = tl.where(is_alive(context), total, float("nan")).to(element)
    tl.store(result + at, total, mask=mask)
    if norm_weight is not None:
        wide = total.to(tl.float32)
        # Rounded as torch rounds; plain division is approximate on a GPU.
        mean_square = tl.div_rn(tl.sum(wide * wide, axis=1), HIDDEN * 1.0)
        scale = tl.div_rn(1.0, tl.sqrt_rn(mean_square + norm_epsilon))
        weight = tl.load(norm_weight + column, mask=in_row, other=0.0).to(tl.float32)
        value = (wide * scale[:, None]).to(element).to(tl.float32) * weight[None, :]
        tl.store(normed + at, value.to(element), mask=mask)


@Kernel
@triton.jit(do_not_specialize=["entries"])
def _push_scalars(
    context, ticket, parts, places, entries,
    TOP_K: tl.constexpr, PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if is_alive(context):
        max_tokens = tl.load(context + MAX_TOKENS)
        entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        place = tl.load(places + entry, mask=entry < entries, other=-1).to(tl.int64)
        part = tl.arange(0, PARTS_PADDED)
        mask = (place >= 0)[:, None] & (part < PARTS)[None, :]
        value = tl.sum(tl.load(parts + place[:, None] * PARTS + part[None, :], mask=mask, other=0.0), axis=1)
        row = entry // TOP_K
        slot = slot_of(context, ticket)
        target = (slot * max_tokens + row % max_tokens) * TOP_K + entry % TOP_K
        base = tl.load(context + PEERS + row // max_tokens, mask=entry < entries, other=0)
        staged = tl.load(context + PEERS + tl.load(context + RANK)) + tl.load(context + COMBINE_STAGED_SCALARS)
        there = base + tl.load(context + COMBINE_SCALARS) + target * 4
        address = tl.where(base == 0, staged + (slot * entries + entry) * 4, there)
        tl.store(address.to(tl.pointer_type(tl.float32)), value, mask=place >= 0)


@Kernel
@triton.jit(do_not_specialize=["entries"])
def _take_scalars(context, ticket, experts, result, entries, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = entry < entries
    routed = tl.load(experts + entry, mask=in_range, other=-1) >= 0
    first = slot_of(context, ticket) * tl.load(context + MAX_TOKENS) * TOP_K
    value = tl.load(own_region(context, COMBINE_SCALARS, tl.float32) + first + entry, mask=routed, other=0.0)
    tl.store(result + entry, tl.where(is_alive(context), value, float("nan")), mask=in_range)


def combine_wait(
    round_: Round,
    experts: Tensor,
    weights: Tensor | None,
    hidden: int,
    dtype: torch.dtype,
    presummed_by: int = 0,
    extras: Extras | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Wait for every rank's rows and sum those of each token; then shared output, residual and norm, where given.

    experts: [T, K] int32 global ids, -1 for not routed. weights: [T, K] float32 of the direct form, or None for a plain
    sum. presummed_by: experts a rank, where ranks sent their sums; 0 where they sent every expert's row.
    Returns [T, H], all NaN once the context has failed, and the same normed or None. The slot stays in use until
    ``release``. Additions are rounded one by one to ``dtype``; the norm is rounded before its weight, as Llama's is.
    """
    tokens, top_k = experts.shape
    result = torch.empty(tokens, hidden, dtype=dtype, device=round_.context.device)
    extras = extras or Extras()
    norm = extras.norm_weight
    normed = None if norm is None else torch.empty_like(result)
    columns = padded(hidden) if norm is not None else min(padded(hidden), BLOCK_HIDDEN)  # a norm needs the whole row
    wait_arrival(round_, COMBINE_ARRIVAL)
    _sum[(max(ceil_div(tokens, BLOCK_TOKENS), 1), ceil_div(hidden, columns))](
        round_.context, round_.ticket, experts, weights, extras.shared, extras.residual, norm, extras.norm_epsilon,
        result, normed, tokens,
        HIDDEN=hidden, TOP_K=top_k, TOP_K_PADDED=padded(top_k), PRESUMMED_BY=presummed_by,
        BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_HIDDEN=columns, num_warps=4,
    )  # fmt: skip
    return result, normed


def find_turns(round_: Round, experts: Tensor, num_local_experts: int) -> Tensor:
    """Which of its token's ranks this one is, for each received row: [R] int32, -1 where no row is.

    experts: [R, K] int32, see ``dispatch.Received``. The dispatch slot must not have been released yet.
    """
    rows, top_k = experts.shape
    turns = torch.empty(rows, dtype=torch.int32, device=experts.device)
    block = 1024 if INTERPRETED else 32
    _find_turns[(ceil_div(rows, block),)](
        round_.context, round_.ticket, experts, turns, rows,
        NUM_LOCAL_EXPERTS=num_local_experts, TOP_K=top_k, TOP_K_PADDED=padded(top_k), BLOCK=block,
    )  # fmt: skip
    return turns


def wait_to_send(round_: Round) -> None:
    """Wait until every owner has released the combine slot that this round fills."""
    wait_credit(round_, COMBINE_CREDIT)


def announce_sent(round_: Round) -> None:
    """Tell every owner that this rank has stored all it has for it."""
    announce(round_, COMBINE_ARRIVAL)


def push_sums(round_: Round, values: Tensor, places: Tensor, weights: Tensor | None, turns: Tensor, top_k: int) -> None:
    """The pre-summed form: sum this rank's rows of each token and bring the sums to their owners.

    values: [C, H]. places: [R, P] int32, the rows of ``values`` that make up each sum, -1 for none: those of
    ``Layout``, with P the top-k, where values are in sorted order. weights: [R, P] float32, None for a plain sum.
    turns: [R] int32 of ``find_turns``. top_k: experts of a token.
    """
    hidden = values.shape[1]
    rows, terms = places.shape
    chunk = min(padded(hidden), COLUMNS_OF_CHUNK)
    chunks = _loads_at_once(ceil_div(hidden, chunk), most=16 if terms == 1 else 4)
    blocks_in_turn = max(min(rows // (round_.programs * ROWS_AT_ONCE), 4), 1)
    _push_sums[(round_.programs,)](
        round_.context, round_.ticket, values, places, weights, turns, rows, blocks_in_turn * ROWS_AT_ONCE,
        HIDDEN=hidden, TOP_K=top_k, TERMS=terms, PACED=round_.paced, PUTS=round_.puts is not None,
        BLOCK_ROWS=ROWS_AT_ONCE, CHUNK=chunk, CHUNKS=chunks, num_warps=WARPS, **(round_.puts or {}),
    )  # fmt: skip


def _loads_at_once(chunks: int, most: int) -> int:
    """Chunks of a row that are loaded together: a divisor where there is a large one, so that none is masked off."""
    exact = [count for count in range(most // 2 + 1, most + 1) if chunks % count == 0]
    return max(exact, default=min(chunks, most))


def push_weight_gradients(round_: Round, parts: Tensor, places: Tensor) -> None:
    """Sum ``parts`` [C, P] float32 over P and bring the gradient of each router weight to its owner.

    places: [R, K] int32 of ``Layout``.
    """
    entries = places.numel()
    block = 1024 if INTERPRETED else 128  # as in gather_sum.sum_parts, so that both sum in the same order
    _push_scalars[(max(ceil_div(entries, block), 1),)](
        round_.context, round_.ticket, parts, places, entries,
        TOP_K=places.shape[1], PARTS=parts.shape[1], PARTS_PADDED=padded(parts.shape[1]), BLOCK=block,
    )  # fmt: skip
    if round_.puts is not None:
        put.put_scalars(round_, places)


def take_weight_gradients(round_: Round, experts: Tensor) -> Tensor:
    """Gradients of the router weights [T, K] float32, after ``combine_wait`` has waited."""
    result = torch.empty(experts.shape, dtype=torch.float32, device=round_.context.device)
    entries = experts.numel()
    block = 1024
    _take_scalars[(max(ceil_div(entries, block), 1),)](
        round_.context, round_.ticket, experts, result, entries, TOP_K=experts.shape[1], BLOCK=block
    )
    return result


def release(round_: Round) -> None:
    """Give the combine slot of this round back to its writers."""
    announce(round_, COMBINE_CREDIT)
