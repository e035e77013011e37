"""The projection whose rows go straight to the owner of their token: down-projection and the gradient of the input."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import hopper, hopper_to_owner
from .experts import multiply_rows
from .launchable import Kernel
from .layout import Layout
from .machine import ceil_div
from .protocol import COMBINE_ROWS, MAX_TOKENS, RANK, Round, is_alive, pace, row_pointers, slot_of
from .tiles import choose_tile, locate_tile, precision


@Kernel
@triton.jit
def _project_to_owner(
    context, ticket, inputs, order, tiles, tile_count, weight,
    DEPTH_SIZE: tl.constexpr, HIDDEN: tl.constexpr, COLUMN_STRIDE: tl.constexpr, DEPTH_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr, PACED: tl.constexpr,
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
        max_tokens = tl.load(context + MAX_TOKENS)
        owner = row // max_tokens
        place = (slot_of(context, ticket) * max_tokens + row % max_tokens) * TOP_K + entry % TOP_K
        element = inputs.dtype.element_ty
        target = row_pointers(context, owner, COMBINE_ROWS, place, HIDDEN, inputs.dtype.element_ty)
        mask = in_range[:, None] & column_valid[None, :]
        tl.store(target[:, None] + column[None, :], total.to(element), mask=mask)
        if PACED:
            sent = tl.sum((in_range & (owner != tl.load(context + RANK))).to(tl.int32))
            width = tl.minimum(HIDDEN - tl.program_id(1) * BLOCK_COLUMNS, BLOCK_COLUMNS)
            pace(context, sent * width * (element.primitive_bitwidth // 8))


def project_to_owner(
    round_: Round,
    inputs: Tensor,
    layout: Layout,
    top_k: int,
    weight: Tensor,
    column_dim: int,
    programs: int,
) -> None:
    """Multiply sorted inputs [C, D] by each expert's matrix and store every row in its owner's combine slot.

    weight: [E, H, D] with ``column_dim`` 1, or [E, D, H] with ``column_dim`` 2, contiguous.
    programs: what Hopper's kernel may take of the GPU, one a multiprocessor.
    """
    hidden, depth = weight.shape[column_dim], weight.shape[3 - column_dim]
    if hopper.usable(inputs, layout.tile_rows, hidden, depth):
        hopper_to_owner.project_to_owner(round_, inputs, layout, top_k, weight, column_dim, programs)
    else:
        tile = choose_tile(layout.tile_rows, inputs.dtype)
        _project_to_owner[(layout.tiles.shape[0], ceil_div(hidden, tile.columns))](
            round_.context, round_.ticket, inputs, layout.order, layout.tiles, layout.tile_count, weight,
            DEPTH_SIZE=depth, HIDDEN=hidden,
            COLUMN_STRIDE=weight.stride(column_dim), DEPTH_STRIDE=weight.stride(3 - column_dim),
            TOP_K=top_k, PACED=round_.paced,
            BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth, PRECISION=precision(inputs.dtype),
            **tile.launch,
        )  # fmt: skip
