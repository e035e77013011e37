"""Between tokens and expert-sorted rows: sums over a token's entries, and the rows of all entries, plain or weighted.

Sums are gathered in a fixed order: position 0 first, in float32.

Gathering here is cheaper than scattering in the GEMM's epilogue, whose plain stores hold up the tensor cores (measured
for Hopper in SonicMoE, arXiv 2512.14080, section 4).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launchable import Kernel
from .layout import OUT_OF_RANGE
from .machine import INTERPRETED, ceil_div, padded
from .protocol import TICKET_FIRST_ROW, SlotRows, is_alive


@Kernel
@triton.jit(do_not_specialize=["tokens"])
def _sum_entries(
    values, places, weights, result, tokens,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, UNSORTED_EXPERTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    in_range = token < tokens
    column_valid = column < HIDDEN
    total = tl.zeros((BLOCK_TOKENS, BLOCK_HIDDEN), tl.float32)
    for k in tl.static_range(TOP_K):
        place = tl.load(places + token * TOP_K + k, mask=in_range, other=-1).to(tl.int64)
        if UNSORTED_EXPERTS > 0:
            place = tl.where(place < UNSORTED_EXPERTS, tl.where(place < 0, place, token * TOP_K + k), OUT_OF_RANGE)
        mask = (place >= 0)[:, None] & column_valid[None, :]
        value = tl.load(values + place[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.where((place <= OUT_OF_RANGE)[:, None], float("nan"), value)
        if WEIGHTED:
            # Fused by name: left to the compiler, this sum and that of the combine would round differently.
            weight = tl.load(weights + token * TOP_K + k, mask=place >= 0, other=1.0)
            total = tl.fma(value, weight[:, None], total)
        else:
            total += value
    mask = in_range[:, None] & column_valid[None, :]
    tl.store(result + token[:, None] * HIDDEN + column[None, :], total.to(result.dtype.element_ty), mask=mask)


@Kernel
@triton.jit(do_not_specialize=["entries"])
def _sum_parts(
    parts, places, result, entries, PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + entry, mask=entry < entries, other=-1).to(tl.int64)
    part = tl.arange(0, PARTS_PADDED)
    mask = (place >= 0)[:, None] & (part < PARTS)[None, :]
    value = tl.load(parts + place[:, None] * PARTS + part[None, :], mask=mask, other=0.0)
    total = tl.where(place == OUT_OF_RANGE, float("nan"), tl.sum(value, axis=1))
    tl.store(result + entry, total, mask=entry < entries)


@Kernel
@triton.jit
def _gather_rows(
    rows, ticket, order, entries, result,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, PLANE: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    if place < tl.load(entries):
        row = (tl.load(order + place) // TOP_K).to(tl.int64)
        if ticket is not None:
            row += tl.load(ticket + TICKET_FIRST_ROW + PLANE)
        column = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
        mask = column < HIDDEN
        tl.store(result + place * HIDDEN + column, tl.load(rows + row * HIDDEN + column, mask=mask), mask=mask)


@Kernel
@triton.jit
def _gather_weighted_rows(
    context, ticket, rows, order, entries, weights, values, result, products,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK_PLACES: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    first, end = tl.program_id(0).to(tl.int64) * BLOCK_PLACES, tl.load(entries)
    if first < end:
        place = first + tl.arange(0, BLOCK_PLACES)
        in_range = place < end
        entry = tl.load(order + place, mask=in_range, other=0)
        row = (entry // TOP_K).to(tl.int64) + tl.load(ticket + TICKET_FIRST_ROW)
        weight = tl.load(weights + entry, mask=in_range, other=0.0)
        # What did not arrive must not pass for a gradient.
        weight = tl.where(is_alive(context), weight, float("nan"))
        product = tl.zeros((BLOCK_PLACES,), tl.float32)
        for start in range(0, HIDDEN, BLOCK_HIDDEN):
            column = start + tl.arange(0, BLOCK_HIDDEN)
            mask = in_range[:, None] & (column < HIDDEN)[None, :]
            at = place[:, None] * HIDDEN + column[None, :]
            wide = tl.load(rows + row[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0).to(tl.float32)
            product += tl.sum(wide * tl.load(values + at, mask=mask, other=0.0).to(tl.float32), axis=1)
            tl.store(result + at, (wide * weight[:, None]).to(result.dtype.element_ty), mask=mask)
        tl.store(products + place, product, mask=in_range)


def gather_rows(rows: Tensor, order: Tensor, offsets: Tensor, top_k: int, slot: SlotRows | None = None) -> Tensor:
    """Rows [R, H] of all entries in sorted order: [C, H], undefined past the last entry. See ``Layout``.

    slot: where the rows lie in a dispatch slot of the region ``rows`` [., H]; they are waited for.
    """
    if slot is not None:
        slot.wait()
    hidden = rows.shape[1]
    result = rows.new_empty(order.shape[0], hidden)
    block_hidden = min(padded(hidden), 2048)
    _gather_rows[(order.shape[0], ceil_div(hidden, block_hidden))](
        rows, None if slot is None else slot.round_.ticket, order, offsets[-1:], result,
        HIDDEN=hidden, TOP_K=top_k, PLANE=0 if slot is None else slot.plane, BLOCK_HIDDEN=block_hidden, num_warps=4,
    )  # fmt: skip
    return result


def gather_weighted_rows(
    slot: SlotRows, rows: Tensor, order: Tensor, offsets: Tensor, weights: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of all entries in sorted order, each times its weight, and the inner product of each with ``values``.

    Of a weighted sum over entries with terms ``values`` [C, H], that is the gradient of the terms and of the weights,
    where the rows are the sum's gradient. slot: where the rows lie in the region ``rows`` [., H]; they are waited for.
    weights: [R, K] float32.
    Returns [C, H] and [C, 1] float32, undefined past the last entry; the rows are NaN in a failed context.
    """
    slot.wait()
    capacity, hidden = values.shape
    result = torch.empty_like(values)
    products = torch.empty(capacity, 1, dtype=torch.float32, device=values.device)
    block_places = 128 if INTERPRETED else 1
    _gather_weighted_rows[(ceil_div(capacity, block_places),)](
        slot.round_.context, slot.round_.ticket, rows, order, offsets[-1:], weights, values, result, products,
        HIDDEN=hidden, TOP_K=weights.shape[1], BLOCK_PLACES=block_places, BLOCK_HIDDEN=min(padded(hidden), 2048),
        num_warps=4,
    )  # fmt: skip
    return result, products


def sum_entries(
    values: Tensor, places: Tensor, weights: Tensor | None, unsorted_experts: int = 0, result: Tensor | None = None
) -> Tensor:
    """Sum the rows of each token's entries: [T, H] from ``values`` [C, H].

    places: [T, K] int32 rows of ``values``, -1 for none, -2 for NaN. weights: [T, K] float32, or None for a plain sum.
    unsorted_experts: E, where ``places`` are the ids of unsorted entries (``layout.unsorted_layout``).
    result: where the sums are written, instead of a tensor of their own.
    """
    tokens, top_k = places.shape
    hidden = values.shape[1]
    if result is None:
        result = values.new_empty(tokens, hidden)
    # A warp reads 512 contiguous bytes of a row at a time; all K loads are in flight at once.
    block_hidden = min(padded(hidden), 128 if INTERPRETED else 1024)
    block_tokens = 128 if INTERPRETED else 1
    grid = (max(ceil_div(tokens, block_tokens), 1), ceil_div(hidden, block_hidden))
    _sum_entries[grid](
        values, places, weights, result, tokens,
        HIDDEN=hidden, TOP_K=top_k, WEIGHTED=weights is not None, UNSORTED_EXPERTS=unsorted_experts,
        BLOCK_TOKENS=block_tokens, BLOCK_HIDDEN=block_hidden, num_warps=4,
    )  # fmt: skip
    return result


def sum_parts(parts: Tensor, places: Tensor) -> Tensor:
    """Sum ``parts`` [C, P] float32 over P for each entry: [T, K] float32, zero for place -1, NaN for place -2."""
    result = torch.empty(places.shape, dtype=torch.float32, device=parts.device)
    entries = places.numel()
    block = 1024 if INTERPRETED else 128
    _sum_parts[(max(ceil_div(entries, block), 1),)](
        parts, places, result, entries, PARTS=parts.shape[1], PARTS_PADDED=padded(parts.shape[1]), BLOCK=block
    )
    return result
