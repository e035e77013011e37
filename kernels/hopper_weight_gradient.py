"""Gradients of the expert weights on Hopper: sums of outer products over each expert's entries. See hopper.py."""

from __future__ import annotations

from torch import Tensor

from .hopper import HAS_GLUON, TILE_COLUMNS, multiprocessors
from .launchable import Kernel
from .layout import Layout
from .protocol import SlotRows

if HAS_GLUON:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        async_copy,
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_init,
        warpgroup_mma_wait,
    )

    from .hopper import (
        _CHUNK,
        _DEPTH,
        _HALF,
        _TICKET_FIRST_ROW,
        _TILE_COLUMNS,
        _TILE_ROWS,
        ACCUMULATOR,
        CHUNK,
        OPERAND,
        STAGED,
        advance,
        announce_gathered,
        before,
        clipped,
        gather_box,
        load_box,
        matrix,
        new_barriers,
        quarters,
        reinterpret,
        store_box,
        thread_barrier,
    )

    CHUNKED = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
    GATHER_WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))

    @gluon.jit
    def _locate_outer(tile, LEFT_TILES: gl.constexpr, RIGHT_TILES: gl.constexpr):
        inside = tile % (LEFT_TILES * RIGHT_TILES)
        return tile // (LEFT_TILES * RIGHT_TILES), inside % LEFT_TILES, inside // LEFT_TILES

    @gluon.jit
    def _load_outer(
        ticket, left, right_desc, order, offsets, a_stages, b_stages, full, empty,
        EXPERTS: gl.constexpr, LEFT_SIZE: gl.constexpr, LEFT_TILES: gl.constexpr, RIGHT_TILES: gl.constexpr,
        TOP_K: gl.constexpr, PLANE: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        if PLANE >= 0:
            left += gl.load(ticket + _TICKET_FIRST_ROW + PLANE) * LEFT_SIZE
        stage = 0
        phase = 1
        begun = stage != 0  # False, of the type that the loop gives it
        for tile in range(gl.program_id(0), EXPERTS * LEFT_TILES * RIGHT_TILES, gl.num_programs(0)):
            expert, left_tile, right_tile = _locate_outer(tile, LEFT_TILES, RIGHT_TILES)
            start = gl.load(offsets + expert)
            end = gl.load(offsets + expert + 1)
            inside = gl.arange(0, _DEPTH, gl.SliceLayout(1, GATHER_WIDE))
            column = left_tile * _TILE_ROWS + gl.arange(0, _TILE_ROWS, gl.SliceLayout(0, GATHER_WIDE))
            entry = gl.load(order + start + inside, mask=start + inside < end, other=0)
            for at in range(start, end, _DEPTH):
                in_range = at + inside < end
                pointers = left + (entry // TOP_K).to(gl.int64)[:, None] * LEFT_SIZE + column[None, :]
                mask = in_range[:, None] & (column < LEFT_SIZE)[None, :]
                # The next step's index, so that its latency lies under this step's copies.
                entry = gl.load(order + at + _DEPTH + inside, mask=at + _DEPTH + inside < end, other=0)
                valid = gl.minimum(end - at, _DEPTH)
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(bar, _TILE_COLUMNS * _DEPTH * 2)
                load_box(
                    right_desc, [at + valid, _DEPTH - valid, right_tile * _TILE_COLUMNS], bar, b_stages.index(stage)
                )
                gather_box(a_stages.index(stage), pointers, mask=mask)
                async_copy.commit_group()
                announce_gathered(full, stage, begun, 1, STAGES)
                begun = True
                stage, phase = advance(stage, phase, STAGES)
        announce_gathered(full, stage, begun, 0, STAGES)

    @gluon.jit
    def _consume_outer(
        offsets, a_stages, b_stages, full, empty, buffers, result_desc, result,
        WARPGROUP: gl.constexpr, EXPERTS: gl.constexpr, LEFT_SIZE: gl.constexpr, LEFT_TILES: gl.constexpr,
        RIGHT_SIZE: gl.constexpr, RIGHT_TILES: gl.constexpr, TRANSPOSED: gl.constexpr, ACCUMULATE: gl.constexpr,
        STAGES: gl.constexpr,
    ):  # fmt: skip
        I_STRIDE: gl.constexpr = 1 if TRANSPOSED else RIGHT_SIZE
        J_STRIDE: gl.constexpr = LEFT_SIZE if TRANSPOSED else 1
        stage = 0
        phase = 0
        panels = reinterpret(a_stages, [2 * STAGES, _DEPTH, _HALF], OPERAND)
        for tile in range(gl.program_id(0), EXPERTS * LEFT_TILES * RIGHT_TILES, gl.num_programs(0)):
            expert, left_tile, right_tile = _locate_outer(tile, LEFT_TILES, RIGHT_TILES)
            start = gl.load(offsets + expert)
            end = gl.load(offsets + expert + 1)
            left = left_tile * _TILE_ROWS + WARPGROUP * _HALF
            total = warpgroup_mma_init(gl.zeros([_HALF, _TILE_COLUMNS], gl.float32, ACCUMULATOR))
            for at in range(start, end, _DEPTH):
                mbarrier.wait(full.index(stage), phase)
                a = panels.index(2 * stage + WARPGROUP).permute((1, 0))
                b = b_stages.index(stage).reshape([_DEPTH, _TILE_COLUMNS])
                total = warpgroup_mma(a, b, total, is_async=True)
                total = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[total]))
                mbarrier.arrive(empty.index(before(stage, STAGES)), count=1, pred=at > start)
                stage, phase = advance(stage, phase, STAGES)
            product = warpgroup_mma_wait(0, deps=[total])
            if end > start:
                mbarrier.arrive(empty.index(before(stage, STAGES)), count=1)
            if ACCUMULATE:
                chunks = quarters(product)
                for part in gl.static_range(4):
                    right = right_tile * _TILE_COLUMNS + part * _CHUNK
                    chunk = gl.convert_layout(chunks[part], CHUNKED, assert_trivial=True)
                    i = gl.arange(0, _HALF, gl.SliceLayout(1, CHUNKED))
                    j = gl.arange(0, _CHUNK, gl.SliceLayout(0, CHUNKED))
                    corner = result + expert.to(gl.int64) * (LEFT_SIZE * RIGHT_SIZE)
                    corner += left * I_STRIDE + right * J_STRIDE
                    pointers = corner + i[:, None] * I_STRIDE + j[None, :] * J_STRIDE
                    # A mask, not a branch: Triton's analysis of alignment fails on loads in a dead branch.
                    mask = (left + i < LEFT_SIZE)[:, None] & (right + j < RIGHT_SIZE)[None, :]
                    value = gl.load(pointers, mask=mask, other=0.0).to(gl.float32) + chunk
                    gl.store(pointers, value.to(result.dtype.element_ty), mask=mask)
            elif left < LEFT_SIZE:
                chunks = quarters(product)
                # By halves, so that one is staged while the stores of the tile before still read the other: with few
                # entries an expert, these stores take most of a tile's time.
                for half in gl.static_range(2):
                    tma.store_wait(2)
                    thread_barrier()
                    for part in gl.static_range(2 * half, 2 * half + 2):
                        rounded = chunks[part].to(buffers.dtype)
                        if TRANSPOSED:
                            buffers.index(4 * WARPGROUP + part).permute((1, 0)).store(rounded)
                        else:
                            buffers.index(4 * WARPGROUP + part).store(rounded)
                    fence_async_shared()
                    thread_barrier()
                    for part in gl.static_range(2 * half, 2 * half + 2):
                        right = right_tile * _TILE_COLUMNS + part * _CHUNK
                        # What lies past the matrix is stored past the last expert, where nothing is written: the wait
                        # counts stores, and each tile must have four.
                        if TRANSPOSED:
                            corner_row = gl.where(right < RIGHT_SIZE, expert * RIGHT_SIZE + right, EXPERTS * RIGHT_SIZE)
                            corner = [corner_row, left]
                        else:
                            corner = [expert * LEFT_SIZE + left, right]
                        store_box(result_desc, corner, buffers.index(4 * WARPGROUP + part))
        tma.store_wait(0)

    @Kernel
    @gluon.jit
    def weight_gradient_kernel(
        ticket, left, right_desc, order, offsets, result_desc, result,
        EXPERTS: gl.constexpr, LEFT_SIZE: gl.constexpr, RIGHT_SIZE: gl.constexpr, TOP_K: gl.constexpr,
        TRANSPOSED: gl.constexpr, ACCUMULATE: gl.constexpr, PLANE: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        LEFT_TILES: gl.constexpr = (LEFT_SIZE + _TILE_ROWS - 1) // _TILE_ROWS
        RIGHT_TILES: gl.constexpr = (RIGHT_SIZE + _TILE_COLUMNS - 1) // _TILE_COLUMNS
        dtype: gl.constexpr = right_desc.dtype
        a_stages = gl.allocate_shared_memory(dtype, [STAGES, _DEPTH, _TILE_ROWS], OPERAND)
        b_stages = gl.allocate_shared_memory(dtype, [STAGES, 1, _DEPTH, _TILE_COLUMNS], STAGED)
        buffers = gl.allocate_shared_memory(dtype, [8, _HALF, _CHUNK], OPERAND)
        full = new_barriers(STAGES, 2)
        empty = new_barriers(STAGES, 2)
        fence_async_shared()
        gl.warp_specialize([
            (_consume_outer, (
                offsets, a_stages, b_stages, full, empty, buffers, result_desc, result, 0, EXPERTS,
                LEFT_SIZE, LEFT_TILES, RIGHT_SIZE, RIGHT_TILES, TRANSPOSED, ACCUMULATE, STAGES)),
            (_consume_outer, (
                offsets, a_stages, b_stages, full, empty, buffers, result_desc, result, 1, EXPERTS,
                LEFT_SIZE, LEFT_TILES, RIGHT_SIZE, RIGHT_TILES, TRANSPOSED, ACCUMULATE, STAGES)),
            (_load_outer, (
                ticket, left, right_desc, order, offsets, a_stages, b_stages, full, empty,
                EXPERTS, LEFT_SIZE, LEFT_TILES, RIGHT_TILES, TOP_K, PLANE, STAGES)),
        ], [4, 4], [224, 56])  # fmt: skip


def weight_gradient(
    gathered_rows: Tensor,
    sorted_rows: Tensor,
    layout: Layout,
    top_k: int,
    transposed: bool,
    accumulate_into: Tensor | None,
    slot: SlotRows | None,
    programs: int | None,
) -> Tensor:
    """Sum of outer products of gathered_rows [R, M] and sorted_rows [C, N]: [E, M, N], or [E, N, M] if ``transposed``.

    See ``experts_backward.weight_gradient``. The gathered rows are the narrow side of the tile whichever way the result
    lies: what cp.async brings costs more than what TMA brings.
    """
    experts = layout.offsets.shape[0] - 1
    left, right = gathered_rows.shape[1], sorted_rows.shape[1]
    shape = (experts, right, left) if transposed else (experts, left, right)
    result = sorted_rows.new_empty(shape) if accumulate_into is None else accumulate_into
    staged = result if accumulate_into is None else sorted_rows
    weight_gradient_kernel[(programs or multiprocessors(sorted_rows.device),)](
        layout.order if slot is None else slot.round_.ticket, gathered_rows, clipped(sorted_rows, TILE_COLUMNS),
        layout.order, layout.offsets, matrix(staged, CHUNK, CHUNK), result,
        EXPERTS=experts, LEFT_SIZE=left, RIGHT_SIZE=right, TOP_K=top_k,
        TRANSPOSED=transposed, ACCUMULATE=accumulate_into is not None, PLANE=-1 if slot is None else slot.plane,
        STAGES=3, num_warps=4,
    )  # fmt: skip
    return result
