"""Gradients of the expert GEMMs.

As in SonicMoE (arXiv 2512.14080), the gradient of a router weight is the inner product of the unweighted gradient
through the down-projection with the activation, so that the expert's output need not be kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .experts import choose_tile, locate_tile, precision, row_tiles
from .machine import padded


@triton.jit
def _down_gradient_swiglu(
    output_gradient, row_weights, order, entry_counts, w2, gate_up,
    gate_up_gradient, weighted_activation, weight_gradient_parts,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, COLUMN_TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert, start, end = locate_tile(entry_counts, tl.program_id(0), EXPERTS, EXPERTS_PADDED, BLOCK_ROWS)
    if expert < EXPERTS:
        at = start + tl.arange(0, BLOCK_ROWS)
        in_range = at < end
        entry = tl.load(order + at, mask=in_range, other=0)
        row = (entry // TOP_K).to(tl.int64)
        at = at.to(tl.int64)
        column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        column_valid = column < INTERMEDIATE
        matrix = w2 + expert.to(tl.int64) * (HIDDEN * INTERMEDIATE) + column[None, :]
        through_down = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for step in range(0, HIDDEN, BLOCK_DEPTH):
            depth = (step + tl.arange(0, BLOCK_DEPTH)).to(tl.int64)
            valid = depth < HIDDEN
            gradient = tl.load(
                output_gradient + row[:, None] * HIDDEN + depth[None, :],
                mask=in_range[:, None] & valid[None, :], other=0.0,
            )  # fmt: skip
            w = tl.load(matrix + depth[:, None] * INTERMEDIATE, mask=valid[:, None] & column_valid[None, :], other=0.0)
            through_down = tl.dot(gradient, w, through_down, input_precision=PRECISION)

        mask = in_range[:, None] & column_valid[None, :]
        saved = at[:, None] * (2 * INTERMEDIATE) + column[None, :]
        gate = tl.load(gate_up + saved, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + saved + INTERMEDIATE, mask=mask, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        activation = gate * sigmoid * up
        part = tl.sum(tl.where(mask, through_down * activation, 0.0), axis=1)
        tl.store(weight_gradient_parts + at * COLUMN_TILES + tl.program_id(1), part, mask=in_range)
        weight = tl.load(row_weights + entry.to(tl.int64), mask=in_range, other=0.0)[:, None]
        element = gate_up_gradient.dtype.element_ty
        weighted = weighted_activation + at[:, None] * INTERMEDIATE + column[None, :]
        tl.store(weighted, (weight * activation).to(element), mask=mask)
        gradient = through_down * weight
        gate_gradient = gradient * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(gate_up_gradient + saved, gate_gradient.to(element), mask=mask)
        tl.store(gate_up_gradient + saved + INTERMEDIATE, (gradient * gate * sigmoid).to(element), mask=mask)


@triton.jit
def _weight_gradient(
    left, right, order, entry_counts, result,
    LEFT_SIZE: tl.constexpr, RIGHT_SIZE: tl.constexpr, TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr,
    BLOCK_LEFT: tl.constexpr, BLOCK_RIGHT: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2)
    index = tl.arange(0, EXPERTS_PADDED)
    counts = tl.load(entry_counts + index, mask=index < EXPERTS, other=0)
    start = tl.sum(tl.where(index < expert, counts, 0))
    end = start + tl.sum(tl.where(index == expert, counts, 0))
    left_column = tl.program_id(0) * BLOCK_LEFT + tl.arange(0, BLOCK_LEFT)
    right_column = tl.program_id(1) * BLOCK_RIGHT + tl.arange(0, BLOCK_RIGHT)
    left_valid, right_valid = left_column < LEFT_SIZE, right_column < RIGHT_SIZE
    total = tl.zeros((BLOCK_LEFT, BLOCK_RIGHT), tl.float32)
    for step in range(start, end, BLOCK_DEPTH):
        at = step + tl.arange(0, BLOCK_DEPTH)
        valid = at < end
        gathered = (tl.load(order + at, mask=valid, other=0) // TOP_K).to(tl.int64)
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
    tl.store(target, total.to(result.dtype.element_ty), mask=left_valid[:, None] & right_valid[None, :])


def down_gradient_swiglu(
    output_gradient: Tensor, row_weights: Tensor, order: Tensor, entry_counts: Tensor, w2: Tensor, gate_up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient through the down-projection and SwiGLU.

    output_gradient: [R, H], one row a received row; row_weights: [R, K] float32; w2: [E, H, I]; gate_up: [C, 2I].
    Returns the gradient of gate_up [C, 2I], the activation times its router weight [C, I] (for the gradient of w2),
    and the parts [C, P] float32 whose sum over P is the gradient of the entry's router weight.
    """
    experts, hidden, intermediate = w2.shape
    capacity = order.shape[0]
    tile = choose_tile(gate_up.dtype)
    column_tiles = triton.cdiv(intermediate, tile.columns)
    gate_up_gradient = torch.empty_like(gate_up)
    weighted_activation = torch.empty(capacity, intermediate, dtype=gate_up.dtype, device=gate_up.device)
    parts = torch.empty(capacity, column_tiles, dtype=torch.float32, device=gate_up.device)
    _down_gradient_swiglu[(row_tiles(capacity, experts, tile.rows), column_tiles)](
        output_gradient, row_weights, order, entry_counts, w2, gate_up, gate_up_gradient, weighted_activation, parts,
        HIDDEN=hidden, INTERMEDIATE=intermediate, TOP_K=row_weights.shape[1],
        EXPERTS=experts, EXPERTS_PADDED=padded(experts), COLUMN_TILES=column_tiles,
        BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth, PRECISION=precision(gate_up.dtype),
        **tile.launch,
    )  # fmt: skip
    return gate_up_gradient, weighted_activation, parts


def weight_gradient(
    left: Tensor, right: Tensor, order: Tensor, entry_counts: Tensor, top_k: int, gather_left: bool
) -> Tensor:
    """Sum of outer products of left [., M] and right [., N] over the entries of each expert: [E, M, N].

    One of the two is sorted by expert, the other (left if ``gather_left``) is indexed by received row.
    An expert without entries gets zeros.
    """
    experts = entry_counts.shape[0]
    left_size, right_size = left.shape[1], right.shape[1]
    result = torch.empty(experts, left_size, right_size, dtype=left.dtype, device=left.device)
    tile = choose_tile(left.dtype)
    grid = (triton.cdiv(left_size, tile.rows), triton.cdiv(right_size, tile.columns), experts)
    _weight_gradient[grid](
        left, right, order, entry_counts, result,
        LEFT_SIZE=left_size, RIGHT_SIZE=right_size, TOP_K=top_k, GATHER_LEFT=gather_left,
        EXPERTS=experts, EXPERTS_PADDED=padded(experts),
        BLOCK_LEFT=tile.rows, BLOCK_RIGHT=tile.columns, BLOCK_DEPTH=tile.depth, PRECISION=precision(left.dtype),
        **tile.launch,
    )  # fmt: skip
    return result
