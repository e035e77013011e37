"""The projection whose rows go straight to the owner of their token: down-projection and the gradient of the input."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .dispatch import Received
from .experts import multiply_rows
from .layout import Layout
from .machine import padded
from .protocol import (
    COMBINE_ARRIVAL,
    COMBINE_CREDIT,
    COMBINE_ROWS,
    COMBINE_SCALARS,
    MAX_TOKENS,
    announce,
    is_alive,
    region,
    slot_of,
    wait_credit,
)
from .tiles import choose_tile, locate_tile, precision


@triton.jit(do_not_specialize=["rows_per_source"])
def _project_to_owner(
    context, ticket, inputs, order, tiles, tile_count, row_tokens, weight, scalars, rows_per_source,
    DEPTH_SIZE: tl.constexpr, HIDDEN: tl.constexpr, COLUMN_STRIDE: tl.constexpr, DEPTH_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr, SCALAR_PARTS: tl.constexpr, SCALAR_PARTS_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    exists, expert, start, end = locate_tile(tiles, tile_count, tl.program_id(0), BLOCK_ROWS)
    if exists & is_alive(context):
        at = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        in_range = at < end
        column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        column_valid = column < HIDDEN
        matrix = weight + expert * (DEPTH_SIZE * HIDDEN) + column.to(tl.int64) * COLUMN_STRIDE
        total = multiply_rows(
            inputs, at, in_range, matrix, column_valid,
            DEPTH_SIZE, DEPTH_SIZE, DEPTH_STRIDE, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, PRECISION,
        )  # fmt: skip
        entry = tl.load(order + at, mask=in_range, other=0)
        row = entry // TOP_K
        token = tl.load(row_tokens + row.to(tl.int64), mask=in_range, other=0).to(tl.int64)
        owner = row // rows_per_source
        place = (slot_of(context, ticket) * tl.load(context + MAX_TOKENS) + token) * TOP_K + entry % TOP_K
        element = inputs.dtype.element_ty
        target = region(context, owner, COMBINE_ROWS, element) + place * HIDDEN
        mask = in_range[:, None] & column_valid[None, :]
        tl.store(target[:, None] + column[None, :], total.to(element), mask=mask)
        if SCALAR_PARTS > 0:  # noqa: SIM102 - the outer one is decided by the compiler
            if tl.program_id(1) == 0:
                part = tl.arange(0, SCALAR_PARTS_PADDED)
                parts = tl.load(
                    scalars + at[:, None] * SCALAR_PARTS + part[None, :],
                    mask=in_range[:, None] & (part < SCALAR_PARTS)[None, :], other=0.0,
                )  # fmt: skip
                scalar = region(context, owner, COMBINE_SCALARS, tl.float32) + place
                tl.store(scalar, tl.sum(parts, axis=1), mask=in_range)


def project_to_owner(
    context: Tensor,
    ticket: Tensor,
    inputs: Tensor,
    received: Received,
    layout: Layout,
    weight: Tensor,
    column_dim: int,
    rows_per_source: int,
    scalar_parts: Tensor | None = None,
) -> None:
    """Multiply sorted inputs [C, D] by each expert's matrix and store every row in its owner's combine slot.

    weight: [E, H, D] with ``column_dim`` 1, or [E, D, H] with ``column_dim`` 2, contiguous.
    scalar_parts: [C, P] float32, summed over P in order and stored beside the row (router-weight gradients), or None.
    """
    hidden, depth = weight.shape[column_dim], weight.shape[3 - column_dim]
    world = received.counts.shape[0]
    tile = choose_tile(layout.tile_rows, inputs.dtype)
    parts = 0 if scalar_parts is None else scalar_parts.shape[1]
    wait_credit(context, ticket, world, COMBINE_CREDIT)
    _project_to_owner[(layout.tiles.shape[0], triton.cdiv(hidden, tile.columns))](
        context, ticket, inputs, layout.order, layout.tiles, layout.tile_count, received.tokens, weight, scalar_parts,
        rows_per_source,
        DEPTH_SIZE=depth, HIDDEN=hidden,
        COLUMN_STRIDE=weight.stride(column_dim), DEPTH_STRIDE=weight.stride(3 - column_dim),
        TOP_K=received.experts.shape[1], SCALAR_PARTS=parts, SCALAR_PARTS_PADDED=padded(parts),
        BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth, PRECISION=precision(inputs.dtype),
        **tile.launch,
    )  # fmt: skip
    announce(context, ticket, world, COMBINE_ARRIVAL)
