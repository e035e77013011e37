"""Expert GEMMs over expert-sorted entries, forward; the down-projection stores each row at the owner of its token.

An *entry* is a (received row, top-k position) pair whose expert is local; ``order`` lists them sorted by expert, and
``entry_counts`` [E_local] says how many each has (layout.py). No host knows these numbers: grids cover the worst case,
and a tile past the last entry ends at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import Received
from .machine import INTERPRETED, padded
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


@dataclass(frozen=True)
class Tile:
    """Block sizes of a GEMM: rows, columns, depth of a step; and how it is launched."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def choose_tile(dtype: torch.dtype) -> Tile:
    """One tile a dtype; its stages fit in the shared memory of sm_80 and later."""
    if INTERPRETED:
        return Tile(32, 128, 128, 4, 1)  # each step costs the interpreter the same, whatever its size
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 2)
    return Tile(64, 128, 64, 4, 3)


@triton.jit
def locate_tile(entry_counts, tile, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Expert of a row tile and its entries [start, end); the expert is EXPERTS past the last tile."""
    index = tl.arange(0, EXPERTS_PADDED)
    counts = tl.load(entry_counts + index, mask=index < EXPERTS, other=0)
    tiles = (counts + BLOCK - 1) // BLOCK
    expert = tl.sum(((tl.cumsum(tiles) <= tile) & (index < EXPERTS)).to(tl.int32))
    before = index < expert
    first_tile = tl.sum(tl.where(before, tiles, 0))
    first_entry = tl.sum(tl.where(before, counts, 0))
    start = first_entry + (tile - first_tile) * BLOCK
    end = first_entry + tl.sum(tl.where(index == expert, counts, 0))
    return expert, start, end


@triton.jit
def _up_swiglu(
    rows, order, entry_counts, w13, gate_up, activated,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert, start, end = locate_tile(entry_counts, tl.program_id(0), EXPERTS, EXPERTS_PADDED, BLOCK_ROWS)
    if expert < EXPERTS:
        at = start + tl.arange(0, BLOCK_ROWS)
        in_range = at < end
        row = (tl.load(order + at, mask=in_range, other=0) // TOP_K).to(tl.int64)
        column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        column_valid = column < INTERMEDIATE
        weight = w13 + expert.to(tl.int64) * (2 * INTERMEDIATE * HIDDEN) + column.to(tl.int64)[None, :] * HIDDEN
        gate = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        up = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for step in range(0, HIDDEN, BLOCK_DEPTH):
            depth = step + tl.arange(0, BLOCK_DEPTH)
            valid = depth < HIDDEN
            mask = in_range[:, None] & valid[None, :]
            x = tl.load(rows + row[:, None] * HIDDEN + depth[None, :], mask=mask, other=0.0)
            mask = valid[:, None] & column_valid[None, :]
            gate_weight = tl.load(weight + depth[:, None], mask=mask, other=0.0)
            gate = tl.dot(x, gate_weight, gate, input_precision=PRECISION)
            up_weight = tl.load(weight + INTERMEDIATE * HIDDEN + depth[:, None], mask=mask, other=0.0)
            up = tl.dot(x, up_weight, up, input_precision=PRECISION)
        mask = in_range[:, None] & column_valid[None, :]
        element = activated.dtype.element_ty
        saved = gate_up + at.to(tl.int64)[:, None] * (2 * INTERMEDIATE) + column[None, :]
        tl.store(saved, gate.to(element), mask=mask)
        tl.store(saved + INTERMEDIATE, up.to(element), mask=mask)
        # Backward sees the rounded pre-activations, so forward starts from them too.
        gate, up = gate.to(element).to(tl.float32), up.to(element).to(tl.float32)
        value = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(activated + at.to(tl.int64)[:, None] * INTERMEDIATE + column[None, :], value.to(element), mask=mask)


@triton.jit(do_not_specialize=["rows_per_source"])
def _project_to_owner(
    context, ticket, inputs, order, entry_counts, row_tokens, weight, scalars, rows_per_source,
    DEPTH_SIZE: tl.constexpr, HIDDEN: tl.constexpr, COLUMN_STRIDE: tl.constexpr, DEPTH_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr,
    SCALAR_PARTS: tl.constexpr, SCALAR_PARTS_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert, start, end = locate_tile(entry_counts, tl.program_id(0), EXPERTS, EXPERTS_PADDED, BLOCK_ROWS)
    if (expert < EXPERTS) & is_alive(context):
        at = start + tl.arange(0, BLOCK_ROWS)
        in_range = at < end
        column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        column_valid = column < HIDDEN
        matrix = weight + expert.to(tl.int64) * (DEPTH_SIZE * HIDDEN) + column.to(tl.int64)[None, :] * COLUMN_STRIDE
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for step in range(0, DEPTH_SIZE, BLOCK_DEPTH):
            depth = (step + tl.arange(0, BLOCK_DEPTH)).to(tl.int64)
            valid = depth < DEPTH_SIZE
            x = tl.load(
                inputs + at.to(tl.int64)[:, None] * DEPTH_SIZE + depth[None, :],
                mask=in_range[:, None] & valid[None, :], other=0.0,
            )  # fmt: skip
            w = tl.load(matrix + depth[:, None] * DEPTH_STRIDE, mask=valid[:, None] & column_valid[None, :], other=0.0)
            total = tl.dot(x, w, total, input_precision=PRECISION)

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
                    scalars + at.to(tl.int64)[:, None] * SCALAR_PARTS + part[None, :],
                    mask=in_range[:, None] & (part < SCALAR_PARTS)[None, :], other=0.0,
                )  # fmt: skip
                scalar = region(context, owner, COMBINE_SCALARS, tl.float32) + place
                tl.store(scalar, tl.sum(parts, axis=1), mask=in_range)


def precision(dtype: torch.dtype) -> str:
    """float32 is computed as float32: tf32 would cost ten bits that its users asked for."""
    return "ieee" if dtype == torch.float32 else "tf32"


def row_tiles(capacity: int, num_experts: int, tile_rows: int) -> int:
    """Row tiles of the worst case: each expert may end in a partial tile."""
    return max(capacity // tile_rows + min(num_experts, capacity), 1)


def up_swiglu(rows: Tensor, top_k: int, order: Tensor, entry_counts: Tensor, w13: Tensor) -> tuple[Tensor, Tensor]:
    """Up-projection of gathered rows with SwiGLU in the epilogue.

    rows: [R, H]; order: [C] int32; w13: [E, 2I, H], gate rows, then up rows.
    Returns gate_up [C, 2I] (saved for backward) and silu(gate) * up [C, I], in the dtype of the rows, sorted by expert.
    """
    experts, twice_intermediate, hidden = w13.shape
    intermediate = twice_intermediate // 2
    capacity = order.shape[0]
    gate_up = torch.empty(capacity, twice_intermediate, dtype=rows.dtype, device=rows.device)
    activated = torch.empty(capacity, intermediate, dtype=rows.dtype, device=rows.device)
    tile = choose_tile(rows.dtype)
    _up_swiglu[(row_tiles(capacity, experts, tile.rows), triton.cdiv(intermediate, tile.columns))](
        rows, order, entry_counts, w13, gate_up, activated,
        HIDDEN=hidden, INTERMEDIATE=intermediate, TOP_K=top_k, EXPERTS=experts, EXPERTS_PADDED=padded(experts),
        BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth, PRECISION=precision(rows.dtype),
        **tile.launch,
    )  # fmt: skip
    return gate_up, activated


def project_to_owner(
    context: Tensor,
    ticket: Tensor,
    inputs: Tensor,
    received: Received,
    order: Tensor,
    entry_counts: Tensor,
    weight: Tensor,
    column_dim: int,
    rows_per_source: int,
    scalar_parts: Tensor | None = None,
) -> None:
    """Multiply sorted inputs [C, D] by each expert's matrix and store every row in its owner's combine slot.

    weight: [E, H, D] with ``column_dim`` 1, or [E, D, H] with ``column_dim`` 2, contiguous.
    scalar_parts: [C, P] float32, summed over P in order and stored beside the row (router-weight gradients), or None.
    """
    experts = weight.shape[0]
    hidden, depth = weight.shape[column_dim], weight.shape[3 - column_dim]
    world = received.counts.shape[0]
    tile = choose_tile(inputs.dtype)
    parts = 0 if scalar_parts is None else scalar_parts.shape[1]
    wait_credit(context, ticket, world, COMBINE_CREDIT)
    _project_to_owner[(row_tiles(order.shape[0], experts, tile.rows), triton.cdiv(hidden, tile.columns))](
        context, ticket, inputs, order, entry_counts, received.tokens, weight, scalar_parts, rows_per_source,
        DEPTH_SIZE=depth, HIDDEN=hidden,
        COLUMN_STRIDE=weight.stride(column_dim), DEPTH_STRIDE=weight.stride(3 - column_dim),
        TOP_K=received.experts.shape[1], EXPERTS=experts, EXPERTS_PADDED=padded(experts),
        SCALAR_PARTS=parts, SCALAR_PARTS_PADDED=padded(parts),
        BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth, PRECISION=precision(inputs.dtype),
        **tile.launch,
    )  # fmt: skip
    announce(context, ticket, world, COMBINE_ARRIVAL)
