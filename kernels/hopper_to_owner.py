"""The projection whose rows go straight to the owner of their token, on Hopper. See hopper.py, experts_to_owner.py.

Two warps of an epilogue store what the consumers have staged: a row of 64 columns is 128 bytes, a packet of NVLink, and
TMA cannot scatter rows to addresses of their own on this architecture.
"""

from __future__ import annotations

from torch import Tensor

from . import protocol
from .hopper import DEPTH, HAS_GLUON, TILE_COLUMNS, TILE_ROWS
from .launchable import Kernel
from .layout import Layout
from .protocol import Round

if HAS_GLUON:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

    from .hopper import (
        _CHUNK,
        _DEPTH,
        _HALF,
        _PEERS,
        _RANK,
        _TILE_COLUMNS,
        _TILE_ROWS,
        EPILOGUE,
        OPERAND,
        STAGED,
        consume_for_epilogue,
        load_tiles,
        matrix,
        new_barriers,
        place,
        reinterpret,
    )

    _DEPTH_WORD, _MAX_TOKENS = gl.constexpr(protocol.DEPTH.value), gl.constexpr(protocol.MAX_TOKENS.value)
    _COMBINE_ROWS, _LINK_RATE = gl.constexpr(protocol.COMBINE_ROWS.value), gl.constexpr(protocol.LINK_RATE.value)
    _LINK_FREE_AT = gl.constexpr(protocol.LINK_FREE_AT.value)
    _PIECE = gl.constexpr(32)  # rows that a step of the epilogue stores

    @gluon.jit
    def _globaltimer():
        return gl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=gl.int64, is_pure=False, pack=1)

    @gluon.jit
    def _pace(context, nbytes):
        """See ``protocol.pace``."""
        now = _globaltimer()
        duration = nbytes.to(gl.int64) * 1000 // gl.load(context + _LINK_RATE)
        gl.atomic_max(context + _LINK_FREE_AT, now, sem="relaxed", scope="gpu")
        end = gl.atomic_add(context + _LINK_FREE_AT, duration, sem="relaxed", scope="gpu") + duration
        while now < end:
            now = _globaltimer()

    @gluon.jit
    def _store_at_owners(
        context, ticket, order, tiles, tile_count, buffers, staged, taken,
        HIDDEN: gl.constexpr, COLUMN_TILES: gl.constexpr, TOP_K: gl.constexpr, PACED: gl.constexpr,
    ):  # fmt: skip
        total = gl.load(tile_count) * COLUMN_TILES
        phase_0 = 0
        phase_1 = 0
        dtype: gl.constexpr = buffers.dtype
        pieces = reinterpret(buffers, [16, 1, _PIECE, _CHUNK], STAGED)
        i = gl.arange(0, _PIECE, gl.SliceLayout(1, EPILOGUE))
        j = gl.arange(0, _CHUNK, gl.SliceLayout(0, EPILOGUE))
        max_tokens = gl.load(context + _MAX_TOKENS).to(gl.int32)
        first = (gl.load(ticket) % gl.load(context + _DEPTH_WORD)) * max_tokens
        region = gl.load(context + _COMBINE_ROWS)
        rank = gl.load(context + _RANK).to(gl.int32)
        for tile in range(gl.program_id(0), total, gl.num_programs(0)):
            _, start, end, column_tile = place(tiles, tile, COLUMN_TILES)
            for step in range(4):  # 32 rows
                consumer = step // 2
                if start + consumer * _HALF < end:
                    if step % 2 == 0:
                        mbarrier.wait(staged.index(consumer), gl.where(consumer == 0, phase_0, phase_1))
                        phase_0 = gl.where(consumer == 0, phase_0 ^ 1, phase_0)
                        phase_1 = gl.where(consumer == 0, phase_1, phase_1 ^ 1)
                    at = start + step * _PIECE + i
                    entry = gl.load(order + at, mask=at < end, other=0)
                    row = entry // TOP_K
                    owner = row // max_tokens
                    target = (first + row % max_tokens) * TOP_K + entry % TOP_K
                    address = gl.load(context + _PEERS + owner) + region + target * (HIDDEN * 2)
                    address = gl.multiple_of(address, 16)
                    pointers = gl.multiple_of(address.to(gl.pointer_type(dtype)), 16)
                    for part in gl.static_range(4):
                        piece = pieces.index(consumer * 8 + part * 2 + step % 2).reshape([_PIECE, _CHUNK])
                        value = piece.load(EPILOGUE)
                        if (step % 2 == 1) & (part == 3):
                            mbarrier.arrive(taken.index(consumer), count=1)
                        column = column_tile * _TILE_COLUMNS + part * _CHUNK
                        mask = (at < end)[:, None] & (column + j < HIDDEN)[None, :]
                        gl.store(pointers[:, None] + (column + j)[None, :], value, mask=mask)
                    if PACED:
                        sent = gl.sum(((at < end) & (owner != rank)).to(gl.int32), axis=0)
                        width = gl.minimum(HIDDEN - column_tile * _TILE_COLUMNS, _TILE_COLUMNS)
                        _pace(context, sent * width * 2)

    @Kernel
    @gluon.jit
    def project_to_owner_kernel(
        context, ticket, inputs_desc, order, tiles, tile_count, weight_desc,
        DEPTH_SIZE: gl.constexpr, HIDDEN: gl.constexpr, TRANSPOSED: gl.constexpr, TOP_K: gl.constexpr,
        PACED: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        COLUMN_TILES: gl.constexpr = (HIDDEN + _TILE_COLUMNS - 1) // _TILE_COLUMNS
        dtype: gl.constexpr = weight_desc.dtype
        a_stages = gl.allocate_shared_memory(dtype, [STAGES, _TILE_ROWS, _DEPTH], OPERAND)
        if TRANSPOSED:
            b_stages = gl.allocate_shared_memory(dtype, [STAGES, _DEPTH, _TILE_COLUMNS], OPERAND)
        else:
            b_stages = gl.allocate_shared_memory(dtype, [STAGES, _TILE_COLUMNS, _DEPTH], OPERAND)
        buffers = gl.allocate_shared_memory(dtype, [8, 1, _HALF, _CHUNK], STAGED)
        full = new_barriers(STAGES, 1)
        empty = new_barriers(STAGES, 2)
        staged = new_barriers(2, 1)
        taken = new_barriers(2, 1)
        fence_async_shared()
        gl.warp_specialize([
            (consume_for_epilogue, (tiles, tile_count, a_stages, b_stages, full, empty, buffers, staged, taken,
                        0, DEPTH_SIZE, COLUMN_TILES, TRANSPOSED, STAGES)),
            (consume_for_epilogue, (tiles, tile_count, a_stages, b_stages, full, empty, buffers, staged, taken,
                        1, DEPTH_SIZE, COLUMN_TILES, TRANSPOSED, STAGES)),
            (load_tiles, (tiles, tiles, tiles, inputs_desc, tiles, tiles, tile_count, weight_desc, a_stages, b_stages,
                          full, empty, DEPTH_SIZE, HIDDEN, COLUMN_TILES, 0, False, TRANSPOSED, False, False, STAGES)),
            (_store_at_owners, (context, ticket, order, tiles, tile_count, buffers, staged, taken,
                                HIDDEN, COLUMN_TILES, TOP_K, PACED)),
        ], [4, 2, 2], [184, 136, 136])  # fmt: skip


def project_to_owner(
    round_: Round,
    inputs: Tensor,
    layout: Layout,
    top_k: int,
    weight: Tensor,
    column_dim: int,
    programs: int,
) -> None:
    """See ``experts_to_owner.project_to_owner``."""
    hidden, depth = weight.shape[column_dim], weight.shape[3 - column_dim]
    block = (TILE_COLUMNS, DEPTH) if column_dim == 1 else (DEPTH, TILE_COLUMNS)
    project_to_owner_kernel[(programs,)](
        round_.context, round_.ticket, matrix(inputs, TILE_ROWS, DEPTH), layout.order, layout.tiles, layout.tile_count,
        matrix(weight, *block),
        DEPTH_SIZE=depth, HIDDEN=hidden, TRANSPOSED=column_dim == 2, TOP_K=top_k, PACED=round_.paced, STAGES=3,
        num_warps=4,
    )  # fmt: skip
