"""The forward GEMMs on Hopper: up-projection with SwiGLU, and the projection of sorted rows. See hopper.py."""

from __future__ import annotations

from torch import Tensor

from .gather_sum import gather_rows
from .hopper import (
    HAS_GLUON,
    SORTED_COPY_FROM,
    TILE_COLUMNS,
    TILE_ROWS,
    multiprocessors,
    new_rows,
    slot_arguments,
)
from .launchable import Kernel
from .layout import Layout
from .protocol import SlotRows
from .tiles import Choice

if HAS_GLUON:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

    from .hopper import (
        _CHUNK,
        _DEPTH,
        _HALF,
        _TILE_COLUMNS,
        _TILE_ROWS,
        DEPTH,
        EPILOGUE,
        OPERAND,
        STAGED,
        clipped,
        load_tiles,
        matrix,
        multiply,
        new_barriers,
        place,
        reinterpret,
        sigmoid,
        stage_product,
        store_box,
    )

    @gluon.jit
    def _consume_up(
        tiles, tile_count, a_stages, b_stages, full, empty, buffers, staged, taken, gate_up_desc,
        WARPGROUP: gl.constexpr, HIDDEN: gl.constexpr, INTERMEDIATE: gl.constexpr, COLUMN_TILES: gl.constexpr,
        TRANSPOSED: gl.constexpr, KEEP: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        total = gl.load(tile_count) * COLUMN_TILES
        stage = 0
        phase = 0
        taken_phase = 1
        for tile in range(gl.program_id(0), total, gl.num_programs(0)):
            _, start, end, column_tile = place(tiles, tile, COLUMN_TILES)
            row = start + WARPGROUP * _HALF
            valid = gl.minimum(end - row, _HALF)
            product, stage, phase = multiply(
                a_stages, b_stages, full, empty, stage, phase, valid > 0, WARPGROUP, HIDDEN, TRANSPOSED, STAGES
            )
            if valid > 0:
                mbarrier.wait(taken.index(WARPGROUP), taken_phase)
                taken_phase = taken_phase ^ 1
                stage_product(product, buffers, WARPGROUP)
                mbarrier.arrive(staged.index(WARPGROUP), count=1)
                if KEEP:
                    for part in gl.static_range(2):
                        column = column_tile * (_TILE_COLUMNS // 2) + part * _CHUNK
                        if column < INTERMEDIATE:
                            gate = buffers.index(4 * WARPGROUP + part)
                            up = buffers.index(4 * WARPGROUP + part + 2)
                            box = row + valid
                            skip = _HALF - valid
                            store_box(gate_up_desc, [box, skip, column], gate)
                            store_box(gate_up_desc, [box, skip, column + INTERMEDIATE], up)
        tma.store_wait(0)

    @gluon.jit
    def _activate(
        tiles, tile_count, buffers, staged, taken, activated,
        INTERMEDIATE: gl.constexpr, COLUMN_TILES: gl.constexpr,
    ):  # fmt: skip
        """The epilogue's warps: silu(gate) * up of the rounded pre-activations, which is what backward sees."""
        total = gl.load(tile_count) * COLUMN_TILES
        phase_0 = 0
        phase_1 = 0
        pieces = reinterpret(buffers, [16, 1, _HALF // 2, _CHUNK], STAGED)
        i = gl.arange(0, _HALF // 2, gl.SliceLayout(1, EPILOGUE))
        j = gl.arange(0, _CHUNK, gl.SliceLayout(0, EPILOGUE))
        for tile in range(gl.program_id(0), total, gl.num_programs(0)):
            _, start, end, column_tile = place(tiles, tile, COLUMN_TILES)
            for step in range(8):  # consumer, column chunk, upper or lower 32 rows
                consumer = step // 4
                if start + consumer * _HALF < end:
                    if step % 4 == 0:
                        mbarrier.wait(staged.index(consumer), gl.where(consumer == 0, phase_0, phase_1))
                        phase_0 = gl.where(consumer == 0, phase_0 ^ 1, phase_0)
                        phase_1 = gl.where(consumer == 0, phase_1, phase_1 ^ 1)
                    gate = pieces.index(consumer * 8 + step % 4).reshape([_HALF // 2, _CHUNK]).load(EPILOGUE)
                    up = pieces.index(consumer * 8 + 4 + step % 4).reshape([_HALF // 2, _CHUNK]).load(EPILOGUE)
                    if step % 4 == 3:
                        mbarrier.arrive(taken.index(consumer), count=1)
                    wide = gate.to(gl.float32)
                    value = wide * sigmoid(wide) * up.to(gl.float32)
                    row = start + consumer * _HALF + (step % 2) * (_HALF // 2)
                    column = column_tile * (_TILE_COLUMNS // 2) + (step // 2 % 2) * _CHUNK
                    corner = activated + row.to(gl.int64) * INTERMEDIATE + column
                    mask = (row + i < end)[:, None] & (column + j < INTERMEDIATE)[None, :]
                    gl.store(corner + i[:, None] * INTERMEDIATE + j[None, :], value.to(buffers.dtype), mask=mask)

    @Kernel
    @gluon.jit
    def up_swiglu_kernel(
        context, ticket, rows, rows_desc, order, tiles, tile_count, w13_desc, gate_up_desc, activated,
        HIDDEN: gl.constexpr, INTERMEDIATE: gl.constexpr, TOP_K: gl.constexpr, TRANSPOSED: gl.constexpr,
        KEEP: gl.constexpr, IN_SLOT: gl.constexpr, AWAITED: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        COLUMN_TILES: gl.constexpr = (INTERMEDIATE + _TILE_COLUMNS // 2 - 1) // (_TILE_COLUMNS // 2)
        dtype: gl.constexpr = w13_desc.dtype
        a_stages = gl.allocate_shared_memory(dtype, [STAGES, _TILE_ROWS, _DEPTH], OPERAND)
        if TRANSPOSED:
            # A row of 256 columns lies as four of 64: those of the gate fill the first two, those of up the others.
            b_stages = gl.allocate_shared_memory(dtype, [STAGES, _DEPTH, _TILE_COLUMNS], OPERAND)
            b_boxes = reinterpret(b_stages, [2 * STAGES, _DEPTH, _TILE_COLUMNS // 2], OPERAND)
        else:
            b_stages = gl.allocate_shared_memory(dtype, [STAGES, _TILE_COLUMNS, _DEPTH], OPERAND)
            b_boxes = b_stages
        buffers = gl.allocate_shared_memory(dtype, [8, 1, _HALF, _CHUNK], STAGED)
        full = new_barriers(STAGES, 2 if TOP_K > 0 else 1)
        empty = new_barriers(STAGES, 2)
        staged = new_barriers(2, 1)
        taken = new_barriers(2, 1)
        fence_async_shared()
        gl.warp_specialize([
            (_consume_up, (tiles, tile_count, a_stages, b_stages, full, empty, buffers, staged, taken, gate_up_desc,
                           0, HIDDEN, INTERMEDIATE, COLUMN_TILES, TRANSPOSED, KEEP, STAGES)),
            (_consume_up, (tiles, tile_count, a_stages, b_stages, full, empty, buffers, staged, taken, gate_up_desc,
                           1, HIDDEN, INTERMEDIATE, COLUMN_TILES, TRANSPOSED, KEEP, STAGES)),
            (load_tiles, (context, ticket, rows, rows_desc, order, tiles, tile_count, w13_desc, a_stages, b_boxes,
                          full, empty, HIDDEN, INTERMEDIATE, COLUMN_TILES, TOP_K, True, TRANSPOSED, IN_SLOT, AWAITED,
                          STAGES)),
            (_activate, (tiles, tile_count, buffers, staged, taken, activated, INTERMEDIATE, COLUMN_TILES)),
        ], [4, 2, 2], [184, 136, 136])  # fmt: skip

    @gluon.jit
    def _consume_project(
        tiles, tile_count, a_stages, b_stages, full, empty, buffers, result_desc,
        WARPGROUP: gl.constexpr, DEPTH_SIZE: gl.constexpr, COLUMN_TILES: gl.constexpr,
        TRANSPOSED: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        total = gl.load(tile_count) * COLUMN_TILES
        stage = 0
        phase = 0
        for tile in range(gl.program_id(0), total, gl.num_programs(0)):
            _, start, end, column_tile = place(tiles, tile, COLUMN_TILES)
            row = start + WARPGROUP * _HALF
            valid = gl.minimum(end - row, _HALF)
            product, stage, phase = multiply(
                a_stages, b_stages, full, empty, stage, phase, valid > 0, WARPGROUP, DEPTH_SIZE, TRANSPOSED,
                STAGES,
            )  # fmt: skip
            if valid > 0:
                stage_product(product, buffers, WARPGROUP)
                for part in gl.static_range(4):
                    column = column_tile * _TILE_COLUMNS + part * _CHUNK
                    buffer = buffers.index(4 * WARPGROUP + part)
                    store_box(result_desc, [row + valid, _HALF - valid, column], buffer)
        tma.store_wait(0)

    @Kernel
    @gluon.jit
    def project_kernel(
        inputs_desc, tiles, tile_count, weight_desc, result_desc,
        DEPTH_SIZE: gl.constexpr, COLUMNS: gl.constexpr, TRANSPOSED: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        COLUMN_TILES: gl.constexpr = (COLUMNS + _TILE_COLUMNS - 1) // _TILE_COLUMNS
        dtype: gl.constexpr = weight_desc.dtype
        a_stages = gl.allocate_shared_memory(dtype, [STAGES, _TILE_ROWS, _DEPTH], OPERAND)
        if TRANSPOSED:
            b_stages = gl.allocate_shared_memory(dtype, [STAGES, _DEPTH, _TILE_COLUMNS], OPERAND)
        else:
            b_stages = gl.allocate_shared_memory(dtype, [STAGES, _TILE_COLUMNS, _DEPTH], OPERAND)
        buffers = gl.allocate_shared_memory(dtype, [8, 1, _HALF, _CHUNK], STAGED)
        full = new_barriers(STAGES, 1)
        empty = new_barriers(STAGES, 2)
        fence_async_shared()
        gl.warp_specialize([
            (_consume_project, (tiles, tile_count, a_stages, b_stages, full, empty, buffers, result_desc,
                                0, DEPTH_SIZE, COLUMN_TILES, TRANSPOSED, STAGES)),
            (_consume_project, (tiles, tile_count, a_stages, b_stages, full, empty, buffers, result_desc,
                                1, DEPTH_SIZE, COLUMN_TILES, TRANSPOSED, STAGES)),
            (load_tiles, (tiles, tiles, tiles, inputs_desc, tiles, tiles, tile_count, weight_desc, a_stages, b_stages,
                          full, empty, DEPTH_SIZE, COLUMNS, COLUMN_TILES, 0, False, TRANSPOSED, False, False, STAGES)),
        ], [4, 2], [232, 40])  # fmt: skip


STAGES = 3


def up_swiglu(
    rows: Tensor,
    layout: Layout,
    top_k: int | None,
    w13: Tensor,
    keep_gate_up: bool,
    transposed: bool,
    choice: Choice | None,
    slot: SlotRows | None,
    programs: int | None,
) -> tuple[Tensor | None, Tensor]:
    """See ``experts.up_swiglu``."""
    twice_intermediate, hidden = w13.shape[2 if transposed else 1], w13.shape[1 if transposed else 2]
    intermediate = twice_intermediate // 2
    capacity = layout.order.shape[0]
    if top_k is not None and (intermediate >= SORTED_COPY_FROM if choice is None else choice.sorted_copy):
        rows, top_k, slot = gather_rows(rows, layout.order, layout.offsets, top_k, slot), None, None
    activated = new_rows(rows, capacity, intermediate)
    gate_up = new_rows(rows, capacity, twice_intermediate) if keep_gate_up else None
    block = (DEPTH, TILE_COLUMNS // 2) if transposed else (TILE_COLUMNS // 2, DEPTH)
    up_swiglu_kernel[(programs or multiprocessors(rows.device),)](
        *slot_arguments(slot, layout), rows, matrix(rows, TILE_ROWS, DEPTH), layout.order, layout.tiles,
        layout.tile_count, matrix(w13, *block), clipped(activated if gate_up is None else gate_up), activated,
        HIDDEN=hidden, INTERMEDIATE=intermediate, TOP_K=top_k or 0, TRANSPOSED=transposed, KEEP=keep_gate_up,
        IN_SLOT=slot is not None, AWAITED=slot is not None and not slot.arrived, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    return gate_up, activated


def project(inputs: Tensor, layout: Layout, weight: Tensor, column_dim: int, programs: int | None) -> Tensor:
    """See ``experts.project``."""
    columns, depth = weight.shape[column_dim], weight.shape[3 - column_dim]
    result = new_rows(inputs, inputs.shape[0], columns)
    block = (TILE_COLUMNS, DEPTH) if column_dim == 1 else (DEPTH, TILE_COLUMNS)
    project_kernel[(programs or multiprocessors(inputs.device),)](
        matrix(inputs, TILE_ROWS, DEPTH), layout.tiles, layout.tile_count, matrix(weight, *block), clipped(result),
        DEPTH_SIZE=depth, COLUMNS=columns, TRANSPOSED=column_dim == 2, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    return result
