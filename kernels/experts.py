"""Expert GEMMs over expert-sorted entries, forward: plain Triton for any architecture, or Hopper's kernels.

An *entry* is a (row, top-k position) pair whose expert is local; a ``Layout`` (layout.py) lists them sorted by expert,
or leaves few of them where they are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import hopper, hopper_forward
from .launchable import Kernel
from .layout import Layout
from .machine import ceil_div
from .protocol import TICKET_FIRST_ROW, SlotRows
from .tiles import Choice, choose_tile, locate_tile, precision


@triton.jit
def multiply_rows(
    rows, row, in_range, matrix, column_valid,
    ROW_STRIDE: tl.constexpr, DEPTH_SIZE: tl.constexpr, DEPTH_STRIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rows[row] times the matrix whose columns start at the pointers ``matrix`` [columns], in float32."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for step in range(0, DEPTH_SIZE, BLOCK_DEPTH):
        depth = (step + tl.arange(0, BLOCK_DEPTH)).to(tl.int64)
        valid = depth < DEPTH_SIZE
        x = tl.load(
            rows + row[:, None] * ROW_STRIDE + depth[None, :], mask=in_range[:, None] & valid[None, :], other=0.0
        )
        w = tl.load(
            matrix[None, :] + depth[:, None] * DEPTH_STRIDE, mask=valid[:, None] & column_valid[None, :], other=0.0
        )
        total = tl.dot(x, w, total, input_precision=PRECISION)
    return total


@Kernel
@triton.jit
def _up_swiglu(
    rows, ticket, order, tiles, tile_count, w13, gate_up, activated,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, COLUMN_STRIDE: tl.constexpr, DEPTH_STRIDE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    exists, expert, start, end = locate_tile(tiles, tile_count, tl.program_id(0), BLOCK_ROWS, NUM_EXPERTS)
    if exists:
        at = start + tl.arange(0, BLOCK_ROWS)
        in_range = at < end
        row = at.to(tl.int64)
        if order is None:
            row = row // TOP_K
        elif TOP_K > 0:
            row = (tl.load(order + at, mask=in_range, other=0) // TOP_K).to(tl.int64)
        if ticket is not None:
            row += tl.load(ticket + TICKET_FIRST_ROW)
        column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        column_valid = column < INTERMEDIATE
        weight = w13 + expert * (2 * INTERMEDIATE * HIDDEN) + column.to(tl.int64)[None, :] * COLUMN_STRIDE
        gate = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        up = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for step in range(0, HIDDEN, BLOCK_DEPTH):
            depth = (step + tl.arange(0, BLOCK_DEPTH)).to(tl.int64)
            valid = depth < HIDDEN
            mask = in_range[:, None] & valid[None, :]
            x = tl.load(rows + row[:, None] * HIDDEN + depth[None, :], mask=mask, other=0.0)
            mask = valid[:, None] & column_valid[None, :]
            at_depth = weight + depth[:, None] * DEPTH_STRIDE
            gate_weight = tl.load(at_depth, mask=mask, other=0.0)
            gate = tl.dot(x, gate_weight, gate, input_precision=PRECISION)
            up_weight = tl.load(at_depth + INTERMEDIATE * COLUMN_STRIDE, mask=mask, other=0.0)
            up = tl.dot(x, up_weight, up, input_precision=PRECISION)
        mask = in_range[:, None] & column_valid[None, :]
        element = activated.dtype.element_ty
        # Backward sees the rounded pre-activations, so forward starts from them too.
        rounded_gate, rounded_up = gate.to(element), up.to(element)
        at = at.to(tl.int64)
        if KEEP:
            saved = gate_up + at[:, None] * (2 * INTERMEDIATE) + column[None, :]
            tl.store(saved, rounded_gate, mask=mask)
            tl.store(saved + INTERMEDIATE, rounded_up, mask=mask)
        gate, up = rounded_gate.to(tl.float32), rounded_up.to(tl.float32)
        value = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(activated + at[:, None] * INTERMEDIATE + column[None, :], value.to(element), mask=mask)


@Kernel
@triton.jit
def _project(
    inputs, tiles, tile_count, weight, result,
    DEPTH_SIZE: tl.constexpr, COLUMNS: tl.constexpr, COLUMN_STRIDE: tl.constexpr, DEPTH_STRIDE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    exists, expert, start, end = locate_tile(tiles, tile_count, tl.program_id(0), BLOCK_ROWS, NUM_EXPERTS)
    if exists:
        at = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        in_range = at < end
        column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        column_valid = column < COLUMNS
        matrix = weight + expert * (DEPTH_SIZE * COLUMNS) + column.to(tl.int64) * COLUMN_STRIDE
        total = multiply_rows(
            inputs, at, in_range, matrix, column_valid,
            DEPTH_SIZE, DEPTH_SIZE, DEPTH_STRIDE, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, PRECISION,
        )  # fmt: skip
        mask = in_range[:, None] & column_valid[None, :]
        tl.store(result + at[:, None] * COLUMNS + column[None, :], total.to(result.dtype.element_ty), mask=mask)


def tile_arguments(layout: Layout) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Order, tiles and tile count as the kernels take them: of unsorted entries only the tiles."""
    return (layout.order, layout.tiles, layout.tile_count) if layout.is_sorted else (None, layout.tiles, None)


def up_swiglu(
    rows: Tensor,
    layout: Layout,
    top_k: int | None,
    w13: Tensor,
    keep_gate_up: bool,
    transposed: bool = False,
    choice: Choice | None = None,
    slot: SlotRows | None = None,
    programs: int | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Up-projection with SwiGLU in the epilogue.

    rows: [R, H], gathered by ``layout.order``; or [C, H] in sorted order where ``top_k`` is None.
    w13: [E, 2I, H], gate rows, then up rows; or, ``transposed``, [E, H, 2I].
    slot: where the rows arrive in a dispatch slot of the region ``rows`` [., H]. Hopper's kernel starts each tile once
        its own rows are there; otherwise all rows are waited for.
    programs: what Hopper's kernel may take of the GPU, one a multiprocessor; by default all.
    Returns the pre-activations [C, 2I] (for backward; None unless ``keep_gate_up``) and silu(gate) * up [C, I], sorted
    by expert, in the dtype of the rows. Places past the last entry are undefined. choice: block sizes that were
    measured; without, a rule chooses.
    """
    column_dim, depth_dim = (2, 1) if transposed else (1, 2)
    twice_intermediate, hidden = w13.shape[column_dim], w13.shape[depth_dim]
    intermediate = twice_intermediate // 2
    if hopper.usable(rows, layout.tile_rows, hidden, intermediate):
        return hopper_forward.up_swiglu(rows, layout, top_k, w13, keep_gate_up, transposed, choice, slot, programs)
    if slot is not None:
        slot.wait()
    capacity = layout.order.shape[0]
    gate_up = rows.new_empty(capacity, twice_intermediate) if keep_gate_up else None
    activated = rows.new_empty(capacity, intermediate)
    tile = choose_tile(layout.tile_rows, rows.dtype, choice and choice.up)
    _up_swiglu[(layout.tiles.shape[0], ceil_div(intermediate, tile.columns))](
        rows, None if slot is None else slot.round_.ticket, *tile_arguments(layout), w13, gate_up, activated,
        HIDDEN=hidden, INTERMEDIATE=intermediate,
        COLUMN_STRIDE=w13.stride(column_dim), DEPTH_STRIDE=w13.stride(depth_dim),
        NUM_EXPERTS=w13.shape[0], TOP_K=top_k or 0, KEEP=keep_gate_up,
        BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth, PRECISION=precision(rows.dtype),
        **tile.launch,
    )  # fmt: skip
    return gate_up, activated


def project(
    inputs: Tensor,
    layout: Layout,
    weight: Tensor,
    column_dim: int,
    choice: Choice | None = None,
    programs: int | None = None,
) -> Tensor:
    """Multiply sorted inputs [C, D] by each expert's matrix: [C, N], sorted.

    weight: [E, N, D] with ``column_dim`` 1, or [E, D, N] with ``column_dim`` 2, contiguous.
    """
    columns, depth = weight.shape[column_dim], weight.shape[3 - column_dim]
    if hopper.usable(inputs, layout.tile_rows, columns, depth):
        return hopper_forward.project(inputs, layout, weight, column_dim, programs)
    result = inputs.new_empty(inputs.shape[0], columns)
    tile = choose_tile(layout.tile_rows, inputs.dtype, choice and choice.down)
    _project[(layout.tiles.shape[0], ceil_div(columns, tile.columns))](
        inputs, *tile_arguments(layout)[1:], weight, result,
        DEPTH_SIZE=depth, COLUMNS=columns,
        COLUMN_STRIDE=weight.stride(column_dim), DEPTH_STRIDE=weight.stride(3 - column_dim),
        NUM_EXPERTS=weight.shape[0],
        BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth, PRECISION=precision(inputs.dtype),
        **tile.launch,
    )  # fmt: skip
    return result
