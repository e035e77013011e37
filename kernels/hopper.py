"""What the grouped GEMMs for Hopper share: one loader and two consumer warpgroups around a ring in shared memory.

Gluon (part of Triton) gives what plain Triton cannot on sm_90: warp roles. A loader fills the ring: weights by TMA,
rows by TMA where they lie in order, by cp.async where an index gathers them (Hopper's TMA has no gather). Two
consumers of one warpgroup each multiply their 64 rows of the 128 x 256 tile, round them into shared memory and go on to
the next tile: what is left to do, stores by TMA or the arithmetic of an epilogue by two more warps, runs under the
tensor cores. A consumer whose 64 rows all lie past the expert's end multiplies nothing.
Roles and tile as in CUTLASS' and SonicMoE's (arXiv 2512.14080) cooperative kernels.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from . import protocol
from .layout import Layout
from .machine import INTERPRETED
from .protocol import SlotRows

try:
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
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    HAS_GLUON = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
except ImportError:
    HAS_GLUON = False

TILE_ROWS = 128
TILE_COLUMNS = 256
DEPTH = 64
HALF = 64  # rows of one consumer
# Gathering by cp.async inside a GEMM costs 5 to 15 % of it, a sorted copy of the rows 200 / I of it.
SORTED_COPY_FROM = 4096  # intermediate size
CHUNK = 64  # columns that an epilogue stages at a time: 128 bytes, the width of the swizzle


@cache
def _is_hopper(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index)[0] == 9


def usable(rows: Tensor, tile_rows: int, *sizes: int) -> bool:
    """Whether these kernels take the operands: a Hopper GPU, 16-bit, 128-row tiles, sizes that fill whole chunks."""
    return (
        HAS_GLUON
        and not INTERPRETED
        and rows.is_cuda
        and rows.numel() > 0
        and rows.dtype in (torch.bfloat16, torch.float16)
        and tile_rows == TILE_ROWS
        and all(size % CHUNK == 0 for size in sizes)
        and _is_hopper(rows.device.index)
    )


def has_margin(rows: Tensor) -> bool:
    """Whether ``rows`` came from ``new_rows``."""
    return rows.is_contiguous() and rows.storage_offset() >= HALF * rows.shape[1]


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def slot_arguments(slot: SlotRows | None, layout: Layout) -> tuple[Tensor, Tensor]:
    """Context and ticket of a kernel that gathers; any tensors where its rows lie in no slot."""
    return (layout.order, layout.order) if slot is None else (slot.round_.context, slot.round_.ticket)


def new_rows(like: Tensor, rows: int, columns: int) -> Tensor:
    """An empty [rows, columns] with 64 rows before it: the base from which ``clipped`` counts."""
    return like.new_empty(HALF + rows, columns)[HALF:]


if HAS_GLUON:
    # Names of Triton 3.6, or of 3.9.
    thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
    load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    store_box = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    gather_box = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
    _REINTERPRET_IS_PRIVATE = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))
    OPERAND = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
    STAGED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))
    ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
    GATHER = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0]))
    EPILOGUE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0]))
    _TILE_ROWS, _TILE_COLUMNS, _DEPTH = gl.constexpr(TILE_ROWS), gl.constexpr(TILE_COLUMNS), gl.constexpr(DEPTH)
    _HALF, _CHUNK = gl.constexpr(HALF), gl.constexpr(CHUNK)
    _RANK, _PEERS = gl.constexpr(protocol.RANK.value), gl.constexpr(protocol.PEERS.value)
    _ROW_ARRIVAL, _EXPIRED = gl.constexpr(protocol.ROW_ARRIVAL.value), gl.constexpr(protocol.EXPIRED.value)
    _TIMEOUT, _ROWS_ARRIVAL = (
        gl.constexpr(protocol.TIMEOUT_NANOSECONDS.value),
        gl.constexpr(protocol.ROWS_ARRIVAL.value),
    )
    _WORLD, _DEPTH_OF_SLOTS = gl.constexpr(protocol.WORLD.value), gl.constexpr(protocol.DEPTH.value)
    _PLANES = gl.constexpr(protocol.PLANES.value)
    _TICKET_FIRST_ROW = gl.constexpr(protocol.TICKET_FIRST_ROW.value)
    # Concurrent programs take up to 16 row tiles of an expert times few column tiles, so that both operands stay in L2.
    _GROUP = gl.constexpr(16)

    def matrix(tensor: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
        """Descriptor of a contiguous tensor as a matrix of its last dimension."""
        columns = tensor.shape[-1]
        shape = [tensor.numel() // columns, columns]
        return TensorDescriptor(tensor, shape, [columns, 1], [block_rows, block_columns], OPERAND.value)

    def clipped(rows: Tensor, block_columns: int = CHUNK) -> TensorDescriptor:
        """Descriptor of ``new_rows`` whose 64-row boxes end at any row: load zeros, store nothing beyond.

        Box (row + valid, 64 - valid, column) holds ``valid`` rows from ``row``: the first two dimensions advance by
        the same stride, and only the second, of size 64, has an end. (Triton's ragged_tma plays the same trick with
        strides that wrap around 2^64; rows before the tensor spare that.)
        """
        count, columns = rows.shape
        base = rows.as_strided((HALF + count, columns), (columns, 1), rows.storage_offset() - HALF * columns)
        return TensorDescriptor(
            base, [count + 1, HALF, columns], [columns, columns, 1], [1, HALF, block_columns], STAGED.value
        )

    @gluon.jit
    def place(tiles, tile, COLUMN_TILES: gl.constexpr):
        """Expert, first sorted row, end of the expert's rows and column tile of a persistent tile."""
        entry = tiles + (tile // COLUMN_TILES) * 4
        expert = gl.load(entry)
        first = gl.load(entry + 1)
        start = gl.load(entry + 2)
        end = gl.load(entry + 3)
        row_tiles = (end - start + _TILE_ROWS - 1) // _TILE_ROWS
        local = tile - first * COLUMN_TILES
        group = local // (_GROUP * COLUMN_TILES)
        inside = local % (_GROUP * COLUMN_TILES)
        height = gl.minimum(row_tiles - group * _GROUP, _GROUP)
        return expert, start + (group * _GROUP + inside % height) * _TILE_ROWS, end, inside // height

    @gluon.jit
    def advance(stage, phase, STAGES: gl.constexpr):
        wrapped = stage + 1 == STAGES
        return gl.where(wrapped, 0, stage + 1), gl.where(wrapped, phase ^ 1, phase)

    @gluon.jit
    def before(stage, STAGES: gl.constexpr):
        return gl.where(stage == 0, STAGES - 1, stage - 1)

    @gluon.jit
    def _place_and_gather(order, tiles, tile, total, COLUMN_TILES: gl.constexpr, TOP_K: gl.constexpr):
        """The tile's place and, where rows are gathered, its entries; of the last tile where there is none."""
        expert, start, end, column_tile = place(tiles, gl.maximum(gl.minimum(tile, total - 1), 0), COLUMN_TILES)
        if TOP_K > 0:
            # Rows past the end repeat the last one: their products are not stored, and a predicate on each copy would
            # cost the loader more than the copies do.
            at = gl.minimum(start + gl.arange(0, _TILE_ROWS, gl.SliceLayout(1, GATHER)), end - 1)
            entry = gl.load(order + at, mask=at < gl.where(total > 0, end, at), other=0)
        else:
            entry = start
        return expert, start, column_tile, entry

    @gluon.jit
    def await_rows(context, ticket, row, deadline):
        """Spin until the row flag of each row is the round's epoch, or the deadline is past: it is noted then.

        Every thread waits for the rows that it copies itself. It looks at all of their flags at once and has one fence
        for them: acquiring loads wait for each other, which made dispatch and up-projection a third slower as a whole.
        """
        base = gl.load(context + _PEERS + gl.load(context + _RANK)) + gl.load(context + _ROW_ARRIVAL)
        expired = (context + _EXPIRED).to(gl.int64)
        epoch = gl.load(ticket).to(gl.int32)
        address = base + row * 4
        seen = gl.inline_asm_elementwise(
            "ld.relaxed.sys.global.b32 $0, [$1];", "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1
        )
        gl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b64 now;
            mov.b32 $0, $1;
            again:
            setp.eq.s32 p, $0, $3;
            @p bra done;
            mov.u64 now, %globaltimer;
            setp.ge.s64 p, now, $4;
            @p bra late;
            ld.relaxed.sys.global.b32 $0, [$2];
            bra again;
            late:
            st.relaxed.sys.global.b64 [$5], 1;
            done:
            }""",
            "=&r,r,l,r,l,l", [seen, address, epoch, deadline, expired], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        gl.inline_asm_elementwise("fence.acq_rel.sys; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)

    @gluon.jit
    def have_all_arrived(context, ticket):
        """Whether every rank has announced all its rows of the round; then they may be read. Each thread asks itself.

        One look instead of a flag a row: dispatch is done long before the GEMM, whose later tiles need no more waits.
        """
        planes, world = gl.load(context + _PLANES), gl.load(context + _WORLD)
        epoch = gl.load(ticket)
        first = epoch % gl.load(context + _DEPTH_OF_SLOTS) * planes * world
        base = gl.load(context + _PEERS + gl.load(context + _RANK)) + gl.load(context + _ROWS_ARRIVAL) + first * 8
        return gl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b64 at, end, seen;
            mov.b64 at, $1;
            mad.lo.s64 end, $3, 8, $1;
            mov.b32 $0, 0;
            next:
            ld.relaxed.sys.global.b64 seen, [at];
            setp.lt.s64 p, seen, $2;
            @p bra done;
            add.s64 at, at, 8;
            setp.lt.s64 p, at, end;
            @p bra next;
            fence.acq_rel.sys;
            mov.b32 $0, 1;
            done:
            }""",
            "=&r,l,l,l", [base, epoch, world], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip

    @gluon.jit
    def load_tiles(
        context, ticket, rows, rows_desc, order, tiles, tile_count, weight_desc, a_stages, b_stages, full, empty,
        DEPTH_SIZE: gl.constexpr, COLUMNS: gl.constexpr, COLUMN_TILES: gl.constexpr,
        TOP_K: gl.constexpr, PAIRED: gl.constexpr, TRANSPOSED: gl.constexpr, IN_SLOT: gl.constexpr,
        AWAITED: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """The loader: rows (gathered by ``order`` unless TOP_K is 0) and weights of each tile, step by step.

        PAIRED: gate and up columns share the tile, half and half. TRANSPOSED: the weight is [E, depth, columns].
        IN_SLOT: gathered rows lie in the dispatch slot of ``ticket``. AWAITED: they may not be there yet.
        b_stages: [STAGES, 256, 64], transposed [STAGES, 64, 256], or both: [2 * STAGES, 64, 128], halves of a stage.
        """
        total = gl.load(tile_count) * COLUMN_TILES
        stage = 0
        phase = 1
        STEP: gl.constexpr = _TILE_COLUMNS // 2 if PAIRED else _TILE_COLUMNS
        BYTES: gl.constexpr = (_TILE_COLUMNS + (0 if TOP_K > 0 else _TILE_ROWS)) * _DEPTH * 2
        if AWAITED:
            now = gl.inline_asm_elementwise(
                "mov.u64 $0, %globaltimer;", "=l", [], dtype=gl.int64, is_pure=False, pack=1
            )
            deadline = now + gl.load(context + _TIMEOUT)
            arrived = gl.where(total < 0, 1, 0)  # 0, of the type that the loop gives it
        tile = gl.program_id(0)
        expert, start, column_tile, entry = _place_and_gather(order, tiles, tile, total, COLUMN_TILES, TOP_K)
        while tile < total:
            if TOP_K > 0:
                depth = gl.arange(0, _DEPTH, gl.SliceLayout(0, GATHER))
                row = (entry // TOP_K).to(gl.int64)
                if IN_SLOT:
                    row += gl.load(ticket + _TICKET_FIRST_ROW)
                if AWAITED:
                    if arrived == 0:
                        arrived = have_all_arrived(context, ticket)
                    if arrived == 0:
                        await_rows(context, ticket, row, deadline)
                # Opaque offsets stay whole: otherwise LLVM keeps the lane's part apart and adds it anew to every
                # pointer in every step, twice the loader's instructions.
                offsets = gl.inline_asm_elementwise(
                    "mov.b64 $0, $1;", "=l,l", [row[:, None] * DEPTH_SIZE + depth[None, :]],
                    dtype=gl.int64, is_pure=True, pack=1,
                )  # fmt: skip
                pointers = rows + gl.max_contiguous(gl.multiple_of(offsets, [1, 8]), [1, 8])
            column = column_tile * STEP
            weight_row = expert * (DEPTH_SIZE if TRANSPOSED else (2 * COLUMNS if PAIRED else COLUMNS))
            x_row = start
            for k in range(0, DEPTH_SIZE, _DEPTH):
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(bar, BYTES)
                if TOP_K > 0:
                    gather_box(a_stages.index(stage), pointers)
                    async_copy.commit_group()
                    pointers += _DEPTH
                if PAIRED and TRANSPOSED:
                    at = weight_row + k
                    load_box(weight_desc, [at, column], bar, b_stages.index(2 * stage))
                    load_box(weight_desc, [at, column + COLUMNS], bar, b_stages.index(2 * stage + 1))
                elif PAIRED:
                    at = weight_row + column
                    b = b_stages.index(stage)
                    load_box(weight_desc, [at, k], bar, b.slice(0, STEP, dim=0))
                    load_box(weight_desc, [at + COLUMNS, k], bar, b.slice(STEP, STEP, dim=0))
                elif TRANSPOSED:
                    load_box(weight_desc, [weight_row + k, column], bar, b_stages.index(stage))
                else:
                    load_box(weight_desc, [weight_row + column, k], bar, b_stages.index(stage))
                if TOP_K > 0:
                    announce_gathered(full, stage, (k > 0) | (tile != gl.program_id(0)), 1, STAGES)
                else:
                    load_box(rows_desc, [x_row, k], bar, a_stages.index(stage))
                stage, phase = advance(stage, phase, STAGES)
                if k == 0:
                    # The index of the next tile, whose latency lies under this tile's products.
                    expert, start, column_tile, entry = _place_and_gather(
                        order, tiles, tile + gl.num_programs(0), total, COLUMN_TILES, TOP_K
                    )
            tile += gl.num_programs(0)
        if TOP_K > 0:
            announce_gathered(full, stage, gl.program_id(0) < total, 0, STAGES)

    @gluon.jit
    def announce_gathered(full, stage, pred, PENDING: gl.constexpr, STAGES: gl.constexpr):
        """Announce the stage before this one, whose rows cp.async has written by now.

        The copies write through the generic proxy and the tensor cores read through the other: the fence between the
        two belongs here, since in the consumers it would hold up every product.
        """
        async_copy.wait_group(PENDING)
        fence_async_shared()
        mbarrier.arrive(full.index(before(stage, STAGES)), count=1, pred=pred)

    @gluon.jit
    def multiply(
        a_stages, b_stages, full, empty, stage, phase, alive,
        WARPGROUP: gl.constexpr, DEPTH_SIZE: gl.constexpr, TRANSPOSED: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """A consumer's 64 x 256 product, in float32; zeros, with the ring kept moving, unless ``alive``."""
        total = gl.zeros([_HALF, _TILE_COLUMNS], gl.float32, ACCUMULATOR)
        if alive:
            total = warpgroup_mma_init(total)
            for k in range(0, DEPTH_SIZE, _DEPTH):
                mbarrier.wait(full.index(stage), phase)
                a = a_stages.index(stage).slice(WARPGROUP * _HALF, _HALF, dim=0)
                b = b_stages.index(stage)
                if not TRANSPOSED:
                    b = b.permute((1, 0))
                total = warpgroup_mma(a, b, total, is_async=True, use_acc=k > 0)
                total = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[total]))
                mbarrier.arrive(empty.index(before(stage, STAGES)), count=1, pred=k > 0)
                stage, phase = advance(stage, phase, STAGES)
            total = warpgroup_mma_wait(0, deps=[total])
            mbarrier.arrive(empty.index(before(stage, STAGES)), count=1)
        else:
            for _ in range(0, DEPTH_SIZE, _DEPTH):
                mbarrier.wait(full.index(stage), phase)
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = advance(stage, phase, STAGES)
        return total, stage, phase

    @gluon.jit
    def reinterpret(buffers, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        if _REINTERPRET_IS_PRIVATE:
            return buffers._reinterpret(buffers.dtype, SHAPE, LAYOUT)
        else:
            return buffers.reinterpret(buffers.dtype, SHAPE, LAYOUT)

    @gluon.jit
    def halves(x):
        """The left and the right half of the columns; registers stay where they are."""
        ROWS: gl.constexpr = x.shape[0]
        COLUMNS: gl.constexpr = x.shape[1] // 2
        return x.reshape([ROWS, 2, COLUMNS]).permute((0, 2, 1)).split()

    @gluon.jit
    def quarters(x):
        left, right = halves(x)
        a, b = halves(left)
        c, d = halves(right)
        return a, b, c, d

    @gluon.jit
    def stage_product(product, buffers, WARPGROUP: gl.constexpr):
        """Round a consumer's product into its four 64 x 64 buffers, once its earlier stores have read them."""
        tma.store_wait(0)
        thread_barrier()
        chunks = quarters(product)
        for part in gl.static_range(4):
            buffers.index(4 * WARPGROUP + part).reshape([_HALF, _CHUNK]).store(chunks[part].to(buffers.dtype))
        fence_async_shared()
        thread_barrier()

    @gluon.jit
    def consume_for_epilogue(
        tiles, tile_count, a_stages, b_stages, full, empty, buffers, staged, taken,
        WARPGROUP: gl.constexpr, DEPTH_SIZE: gl.constexpr, COLUMN_TILES: gl.constexpr, TRANSPOSED: gl.constexpr,
        STAGES: gl.constexpr,
    ):  # fmt: skip
        """A consumer that leaves all but its product to the epilogue's warps."""
        total = gl.load(tile_count) * COLUMN_TILES
        stage = 0
        phase = 0
        taken_phase = 1
        for tile in range(gl.program_id(0), total, gl.num_programs(0)):
            _, start, end, _ = place(tiles, tile, COLUMN_TILES)
            alive = start + WARPGROUP * _HALF < end
            product, stage, phase = multiply(
                a_stages, b_stages, full, empty, stage, phase, alive, WARPGROUP, DEPTH_SIZE, TRANSPOSED, STAGES
            )
            if alive:
                mbarrier.wait(taken.index(WARPGROUP), taken_phase)
                taken_phase = taken_phase ^ 1
                stage_product(product, buffers, WARPGROUP)
                mbarrier.arrive(staged.index(WARPGROUP), count=1)

    @gluon.jit
    def sigmoid(x):
        """1 / (1 + exp(-x)) by the two approximate instructions: error below 1e-6, and a third of the instructions."""
        return gl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"
            " rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip

    @gluon.jit
    def new_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
        barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(COUNT):
            mbarrier.init(barriers.index(i), count=ARRIVALS)
        return barriers
