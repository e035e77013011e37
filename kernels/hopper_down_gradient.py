"""Gradient through the down-projection and SwiGLU on Hopper. See hopper.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .gather_sum import gather_rows
from .hopper import HAS_GLUON, SORTED_COPY_FROM, TILE_COLUMNS, TILE_ROWS, multiprocessors, new_rows, slot_arguments
from .launchable import Kernel
from .layout import Layout
from .machine import ceil_div
from .protocol import SlotRows

if HAS_GLUON:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

    from .hopper import (
        _CHUNK,
        _DEPTH,
        _HALF,
        _TILE_COLUMNS,
        _TILE_ROWS,
        CHUNK,
        DEPTH,
        EPILOGUE,
        OPERAND,
        STAGED,
        consume_for_epilogue,
        load_box,
        load_tiles,
        matrix,
        new_barriers,
        place,
        reinterpret,
        sigmoid,
        thread_barrier,
    )

    _PIECES_AHEAD = gl.constexpr(2)
    _PIECE = gl.constexpr(32)  # rows that the epilogue of the down gradient holds in registers at a time

    @gluon.jit
    def _load_pre_activations(desc, ring, ready, step, start, first, INTERMEDIATE: gl.constexpr):
        """Gate and up of the step's 16 rows and 64 columns into its slot; rows past the expert's end are not used."""
        slot = step % _PIECES_AHEAD
        row = start + step // 4 * _PIECE
        column = first + step % 4 * _CHUNK
        mbarrier.expect(ready.index(slot), 2 * _PIECE * _CHUNK * 2)
        load_box(desc, [row, column], ready.index(slot), ring.index(2 * slot))
        load_box(desc, [row, column + INTERMEDIATE], ready.index(slot), ring.index(2 * slot + 1))

    @gluon.jit
    def _differentiate_swiglu(
        weights, order, tiles, tile_count, buffers, row_weights, ring, ready, staged, taken, gate_up_desc,
        gradient, weighted, parts,
        INTERMEDIATE: gl.constexpr, COLUMN_TILES: gl.constexpr, TRANSPOSED: gl.constexpr,
    ):  # fmt: skip
        """The epilogue's warps: gradients of gate and up, the weighted activation, the router weight's gradient."""
        total = gl.load(tile_count) * COLUMN_TILES
        phase_0 = 0
        phase_1 = 0
        pieces = reinterpret(buffers, [16, 1, _PIECE, _CHUNK], STAGED)
        ROWS: gl.constexpr = gl.SliceLayout(1, EPILOGUE)
        i = gl.arange(0, _PIECE, ROWS)
        j = gl.arange(0, _CHUNK, gl.SliceLayout(0, EPILOGUE))
        for tile in range(gl.program_id(0), total, gl.num_programs(0)):
            _, start, end, column_tile = place(tiles, tile, COLUMN_TILES)
            first = column_tile * _TILE_COLUMNS
            for step in gl.static_range(_PIECES_AHEAD):
                _load_pre_activations(gate_up_desc, ring, ready, step, start, first, INTERMEDIATE)
            for piece_row in gl.static_range(4):
                at = start + piece_row * _PIECE + i
                entry = gl.load(order + at, mask=at < end, other=0)
                row_weights.index(piece_row).store(gl.load(weights + entry, mask=at < end, other=0.0))
            inner = gl.zeros([_PIECE], gl.float32, ROWS)
            for step in range(16):  # 32 rows, column chunk
                slot = step % _PIECES_AHEAD
                mbarrier.wait(ready.index(slot), step // _PIECES_AHEAD & 1)
                gate = ring.index(2 * slot).load(EPILOGUE).to(gl.float32)
                up = ring.index(2 * slot + 1).load(EPILOGUE).to(gl.float32)
                thread_barrier()
                if step < 16 - _PIECES_AHEAD:
                    _load_pre_activations(gate_up_desc, ring, ready, step + _PIECES_AHEAD, start, first, INTERMEDIATE)
                row = start + step // 4 * _PIECE
                column = first + step % 4 * _CHUNK
                consumer = step // 8
                if start + consumer * _HALF < end:
                    if step % 8 == 0:
                        mbarrier.wait(staged.index(consumer), gl.where(consumer == 0, phase_0, phase_1))
                        phase_0 = gl.where(consumer == 0, phase_0 ^ 1, phase_0)
                        phase_1 = gl.where(consumer == 0, phase_1, phase_1 ^ 1)
                    piece = pieces.index(consumer * 8 + step % 4 * 2 + step // 4 % 2).reshape([_PIECE, _CHUNK])
                    through_down = piece.load(EPILOGUE).to(gl.float32)
                    if TRANSPOSED and INTERMEDIATE % _TILE_COLUMNS != 0:
                        # Past the last column a box holds the next expert's rows, not the zeros that TMA fills in.
                        through_down = gl.where(column < INTERMEDIATE, through_down, 0.0)
                    weight = row_weights.index(step // 4).load(ROWS).expand_dims(1)
                    if step % 8 == 7:
                        mbarrier.arrive(taken.index(consumer), count=1)
                    slope = sigmoid(gate)
                    silu = gate * slope
                    activation = silu * up
                    inner += gl.sum(through_down * activation, axis=1)
                    through_down = through_down * weight
                    dtype: gl.constexpr = buffers.dtype
                    mask = (row + i < end)[:, None] & (column + j < INTERMEDIATE)[None, :]
                    corner = gradient + row.to(gl.int64) * (2 * INTERMEDIATE) + column
                    pointers = corner + i[:, None] * (2 * INTERMEDIATE) + j[None, :]
                    gate_gradient = through_down * up * (slope + silu * (1.0 - slope))
                    gl.store(pointers, gate_gradient.to(dtype), mask=mask)
                    gl.store(pointers + INTERMEDIATE, (through_down * silu).to(dtype), mask=mask)
                    corner = weighted + row.to(gl.int64) * INTERMEDIATE + column
                    pointers = corner + i[:, None] * INTERMEDIATE + j[None, :]
                    gl.store(pointers, (activation * weight).to(dtype), mask=mask)
                    if step % 4 == 3:
                        target = parts + row.to(gl.int64) * COLUMN_TILES + column_tile
                        gl.store(target + i * COLUMN_TILES, inner, mask=row + i < end)
                        inner = gl.zeros([_PIECE], gl.float32, ROWS)

    @Kernel
    @gluon.jit
    def down_gradient_kernel(
        context, ticket, output_gradient, output_gradient_desc, weights, order, tiles, tile_count, w2_desc,
        gate_up_desc, gradient, weighted, parts,
        HIDDEN: gl.constexpr, INTERMEDIATE: gl.constexpr, TOP_K: gl.constexpr, TRANSPOSED: gl.constexpr,
        IN_SLOT: gl.constexpr, AWAITED: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        COLUMN_TILES: gl.constexpr = (INTERMEDIATE + _TILE_COLUMNS - 1) // _TILE_COLUMNS
        dtype: gl.constexpr = w2_desc.dtype
        a_stages = gl.allocate_shared_memory(dtype, [STAGES, _TILE_ROWS, _DEPTH], OPERAND)
        if TRANSPOSED:
            b_stages = gl.allocate_shared_memory(dtype, [STAGES, _TILE_COLUMNS, _DEPTH], OPERAND)
        else:
            b_stages = gl.allocate_shared_memory(dtype, [STAGES, _DEPTH, _TILE_COLUMNS], OPERAND)
        buffers = gl.allocate_shared_memory(dtype, [8, 1, _HALF, _CHUNK], STAGED)
        ring = gl.allocate_shared_memory(dtype, [2 * _PIECES_AHEAD, _PIECE, _CHUNK], OPERAND)
        ready = new_barriers(_PIECES_AHEAD, 1)
        row_weights = gl.allocate_shared_memory(gl.float32, [4, _PIECE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        full = new_barriers(STAGES, 2 if TOP_K > 0 else 1)
        empty = new_barriers(STAGES, 2)
        staged = new_barriers(2, 1)
        taken = new_barriers(2, 1)
        fence_async_shared()
        gl.warp_specialize([
            (consume_for_epilogue, (
                tiles, tile_count, a_stages, b_stages, full, empty, buffers, staged, taken,
                0, HIDDEN, COLUMN_TILES, not TRANSPOSED, STAGES)),
            (consume_for_epilogue, (
                tiles, tile_count, a_stages, b_stages, full, empty, buffers, staged, taken,
                1, HIDDEN, COLUMN_TILES, not TRANSPOSED, STAGES)),
            (load_tiles, (
                context, ticket, output_gradient, output_gradient_desc, order, tiles, tile_count, w2_desc,
                a_stages, b_stages, full, empty, HIDDEN, INTERMEDIATE, COLUMN_TILES, TOP_K, False, not TRANSPOSED,
                IN_SLOT, AWAITED, STAGES)),
            (_differentiate_swiglu, (
                weights, order, tiles, tile_count, buffers, row_weights, ring, ready, staged, taken, gate_up_desc,
                gradient, weighted, parts, INTERMEDIATE, COLUMN_TILES, TRANSPOSED)),
        ], [4, 2, 2], [160, 184, 184])  # fmt: skip


def down_gradient_swiglu(
    output_gradient: Tensor,
    weights: Tensor,
    layout: Layout,
    w2: Tensor,
    gate_up: Tensor,
    transposed: bool,
    slot: SlotRows | None,
    programs: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``experts_backward.down_gradient_swiglu``."""
    hidden, intermediate = w2.shape[2 if transposed else 1], w2.shape[1 if transposed else 2]
    capacity = gate_up.shape[0]
    top_k = weights.shape[1]
    if intermediate >= SORTED_COPY_FROM:
        output_gradient, top_k, slot = gather_rows(output_gradient, layout.order, layout.offsets, top_k, slot), 0, None
    gate_up_gradient = new_rows(gate_up, capacity, 2 * intermediate)
    weighted_activation = new_rows(gate_up, capacity, intermediate)
    column_tiles = ceil_div(intermediate, TILE_COLUMNS)
    parts = torch.empty(capacity, column_tiles, dtype=torch.float32, device=gate_up.device)
    down_gradient_kernel[(programs or multiprocessors(gate_up.device),)](
        *slot_arguments(slot, layout), output_gradient, matrix(output_gradient, TILE_ROWS, DEPTH), weights,
        layout.order, layout.tiles, layout.tile_count,
        matrix(w2, *((TILE_COLUMNS, DEPTH) if transposed else (DEPTH, TILE_COLUMNS))),
        matrix(gate_up, 32, CHUNK), gate_up_gradient, weighted_activation, parts,
        HIDDEN=hidden, INTERMEDIATE=intermediate, TOP_K=top_k, TRANSPOSED=transposed, IN_SLOT=slot is not None,
        AWAITED=slot is not None and not slot.arrived, STAGES=3, num_warps=4,
    )  # fmt: skip
    return gate_up_gradient, weighted_activation, parts
