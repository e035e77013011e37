"""Gradients of the expert GEMMs: plain Triton for any architecture, or Hopper's kernels.

As in SonicMoE (arXiv 2512.14080), the gradient of a router weight is the inner product of the unweighted gradient
through the down-projection with the activation, so that the expert's output need not be kept.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hopper, hopper_down_gradient, hopper_weight_gradient
from .experts import multiply_rows
from .launchable import Kernel
from .layout import Layout
from .machine import INTERPRETED, ceil_div
from .protocol import TICKET_FIRST_ROW, SlotRows
from .tiles import Tile, choose_tile, locate_tile, precision


@Kernel
@triton.jit
def _down_gradient_swiglu(
    output_gradient, ticket, weights, order, tiles, tile_count, w2, gate_up,
    gate_up_gradient, weighted_activation, weight_gradient_parts,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, COLUMN_STRIDE: tl.constexpr, DEPTH_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr, COLUMN_TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    exists, expert, start, end = locate_tile(tiles, tile_count, tl.program_id(0), BLOCK_ROWS)
    if exists:
        at = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        in_range = at < end
        entry = tl.load(order + at, mask=in_range, other=0)
        row = (entry // TOP_K).to(tl.int64)
        if ticket is not None:
            row += tl.load(ticket + TICKET_FIRST_ROW)
        column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        column_valid = column < INTERMEDIATE
        matrix = w2 + expert * (HIDDEN * INTERMEDIATE) + column.to(tl.int64) * COLUMN_STRIDE
        through_down = multiply_rows(
            output_gradient, row, in_range, matrix, column_valid,
            HIDDEN, HIDDEN, DEPTH_STRIDE, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, PRECISION,
        )  # fmt: skip
        mask = in_range[:, None] & column_valid[None, :]
        saved = at[:, None] * (2 * INTERMEDIATE) + column[None, :]
        gate = tl.load(gate_up + saved, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + saved + INTERMEDIATE, mask=mask, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        activation = gate * sigmoid * up
        part = tl.sum(tl.where(mask, through_down * activation, 0.0), axis=1)
        tl.store(weight_gradient_parts + at * COLUMN_TILES + tl.program_id(1), part, mask=in_range)
        weight = tl.load(weights + entry.to(tl.int64), mask=in_range, other=0.0)[:, None]
        element = gate_up_gradient.dtype.element_ty
        weighted = weighted_activation + at[:, None] * INTERMEDIATE + column[None, :]
        tl.store(weighted, (weight * activation).to(element), mask=mask)
        gradient = through_down * weight
        gate_gradient = gradient * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(gate_up_gradient + saved, gate_gradient.to(element), mask=mask)
        tl.store(gate_up_gradient + saved + INTERMEDIATE, (gradient * gate * sigmoid).to(element), mask=mask)


@Kernel
@triton.jit
def _weight_gradient(
    left, right, ticket, order, offsets, result,
    LEFT_SIZE: tl.constexpr, RIGHT_SIZE: tl.constexpr, TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr, ACCUMULATE: tl.constexpr, PLANE: tl.constexpr,
    BLOCK_LEFT: tl.constexpr, BLOCK_RIGHT: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2)
    start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    first_row = tl.zeros((), tl.int64)
    if ticket is not None:
        first_row += tl.load(ticket + TICKET_FIRST_ROW + PLANE)
    left_column = tl.program_id(0) * BLOCK_LEFT + tl.arange(0, BLOCK_LEFT)
    right_column = tl.program_id(1) * BLOCK_RIGHT + tl.arange(0, BLOCK_RIGHT)
    left_valid, right_valid = left_column < LEFT_SIZE, right_column < RIGHT_SIZE
    total = tl.zeros((BLOCK_LEFT, BLOCK_RIGHT), tl.float32)
    for step in range(start, end, BLOCK_DEPTH):
        at = step + tl.arange(0, BLOCK_DEPTH)
        valid = at < end
        gathered = first_row + tl.load(order + at, mask=valid, other=0) // TOP_K
        sorted_row = at.to(tl.int64)
        left_row = gathered if GATHER_LEFT else sorted_row
        right_row = sorted_row if GATHER_LEFT else gathered
        a = tl.load(
            left + left_row[None, :] * LEFT_SIZE + left_column[:, None],
            mask=valid[None, :] & left_valid[:, None], other=0.0,
        )  # fmt: skip
        b = tl.load(
            right + right_row[:, None] * RIGHT_SIZE + right_column[None, :],
            mask=valid[:, None] & right_valid[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(a, b, total, input_precision=PRECISION)
    target = result + expert.to(tl.int64) * (LEFT_SIZE * RIGHT_SIZE)
    target += left_column.to(tl.int64)[:, None] * RIGHT_SIZE + right_column[None, :]
    mask = left_valid[:, None] & right_valid[None, :]
    if ACCUMULATE:
        total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, total.to(result.dtype.element_ty), mask=mask)


def down_gradient_tile(rows: int, dtype: torch.dtype) -> Tile:
    """Fewer columns than the other GEMMs have: the epilogue holds six such tiles in registers."""
    tile = choose_tile(rows, dtype)
    return tile if INTERPRETED else replace(tile, columns=64 if rows <= 32 else 32)


def down_gradient_swiglu(
    output_gradient: Tensor,
    weights: Tensor,
    layout: Layout,
    w2: Tensor,
    gate_up: Tensor,
    transposed: bool = False,
    slot: SlotRows | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient through the down-projection and SwiGLU.

    output_gradient: [R, H], by row of the forward pass; weights: [R, K] float32; w2: [E, H, I] or, ``transposed``,
    [E, I, H]; gate_up: [C, 2I].
    slot, programs: as for ``experts.up_swiglu``, for ``output_gradient``.
    Returns the gradient of gate_up [C, 2I], the activation times its router weight [C, I] (for the gradient of w2),
    and the parts [C, P] float32 whose sum over P is the gradient of the entry's router weight.
    """
    column_dim, depth_dim = (1, 2) if transposed else (2, 1)
    hidden, intermediate = w2.shape[depth_dim], w2.shape[column_dim]
    if hopper.usable(output_gradient, layout.tile_rows, hidden, intermediate):
        return hopper_down_gradient.down_gradient_swiglu(
            output_gradient, weights, layout, w2, gate_up, transposed, slot, programs
        )
    if slot is not None:
        slot.wait()
    tile = down_gradient_tile(layout.tile_rows, gate_up.dtype)
    column_tiles = ceil_div(intermediate, tile.columns)
    gate_up_gradient = torch.empty_like(gate_up)
    weighted_activation = gate_up.new_empty(gate_up.shape[0], intermediate)
    parts = torch.empty(gate_up.shape[0], column_tiles, dtype=torch.float32, device=gate_up.device)
    _down_gradient_swiglu[(layout.tiles.shape[0], column_tiles)](
        output_gradient, None if slot is None else slot.round_.ticket, weights, layout.order, layout.tiles,
        layout.tile_count, w2, gate_up, gate_up_gradient, weighted_activation, parts,
        HIDDEN=hidden, INTERMEDIATE=intermediate,
        COLUMN_STRIDE=w2.stride(column_dim), DEPTH_STRIDE=w2.stride(depth_dim),
        TOP_K=weights.shape[1], COLUMN_TILES=column_tiles,
        BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth, PRECISION=precision(gate_up.dtype),
        **tile.launch,
    )  # fmt: skip
    return gate_up_gradient, weighted_activation, parts


def weight_gradient(
    left: Tensor,
    right: Tensor,
    layout: Layout,
    top_k: int,
    gather_left: bool,
    accumulate_into: Tensor | None = None,
    slot: SlotRows | None = None,
    programs: int | None = None,
) -> Tensor:
    """Sum of outer products of left [., M] and right [., N] over the entries of each expert: [E, M, N].

    One of the two is sorted by expert, the other (left if ``gather_left``) is indexed by row.
    An expert without entries gets zeros. With ``accumulate_into`` [E, M, N], of any floating dtype, the sum is added to
    it and it is returned. slot: where the rows indexed by row lie in a dispatch slot, in which all have arrived.
    programs: as for ``experts.up_swiglu``.
    """
    experts = layout.offsets.shape[0] - 1
    left_size, right_size = left.shape[1], right.shape[1]
    gathered, ordered = (left, right) if gather_left else (right, left)
    if hopper.usable(gathered, layout.tile_rows, left_size, right_size) and hopper.has_margin(ordered):
        return hopper_weight_gradient.weight_gradient(
            gathered, ordered, layout, top_k, not gather_left, accumulate_into, slot, programs
        )
    result = left.new_empty(experts, left_size, right_size) if accumulate_into is None else accumulate_into
    tile = choose_tile(64, left.dtype)
    _weight_gradient[(ceil_div(left_size, tile.rows), ceil_div(right_size, tile.columns), experts)](
        left, right, None if slot is None else slot.round_.ticket, layout.order, layout.offsets, result,
        LEFT_SIZE=left_size, RIGHT_SIZE=right_size, TOP_K=top_k,
        GATHER_LEFT=gather_left, ACCUMULATE=accumulate_into is not None, PLANE=0 if slot is None else slot.plane,
        BLOCK_LEFT=tile.rows, BLOCK_RIGHT=tile.columns, BLOCK_DEPTH=tile.depth, PRECISION=precision(left.dtype),
        **tile.launch,
    )  # fmt: skip
    return result
