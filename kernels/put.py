"""The second reach: peers that no load or store reaches get their rows by NVSHMEM's puts.

What is put has been staged in this rank's part of the symmetric buffer: rows and routing where this rank's own would
lie in its own slot, which is the address that they have at the peer too; sums in a region for them. Rows and sums are
put by the kernels that stage them, batch by batch, so that the link is busy while the next batch is read; routing and
gradients of router weights by kernels of their own. All puts of a kernel are complete before it ends, and only the
kernel after it signals, so the flags mean what they mean elsewhere.

NVSHMEM's calls take registers and seconds of compile time (up to 49 KB of code and 8 s a kernel); where no rank has
such peers, no kernel has any. The interpreter has no NVSHMEM and copies between the ranks' memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language import core

from .launchable import Kernel
from .machine import INTERPRETED
from .protocol import (
    COMBINE_ROWS,
    COMBINE_SCALARS,
    COMBINE_STAGED_ROWS,
    COMBINE_STAGED_SCALARS,
    DISPATCH_COUNTS,
    DISPATCH_EXPERTS,
    DISPATCH_ROWS,
    DISPATCH_SCALES,
    DISPATCH_WEIGHTS,
    MAX_TOKENS,
    PEERS,
    RANK,
    WORLD,
    Round,
    flag_index,
    is_alive,
    slot_of,
)

_SET = tl.constexpr(9)  # NVSHMEM_SIGNAL_SET
# A put holds up those that ask for it until the data has left this rank's memory or, where peers share NVLink, has
# arrived. So each warp puts a row of its own. More programs instead, of fewer warps, come to lie on as many
# multiprocessors, and GEMMs and attention, which were promised all but a few, wait for their end.
WARPS = 16
_WARPS = tl.constexpr(WARPS)
# A block of a value a thread, alike within a warp, makes each warp's call its own.
_LANES = tl.constexpr(1 if INTERPRETED else 32)

if INTERPRETED:

    @triton.jit
    def _copy(context, target, source, nbytes, peer, wanted, WIDTH: tl.constexpr):
        own = tl.load(context + PEERS + tl.load(context + RANK)) + source
        there = tl.load(context + PEERS + tl.load(context + WORLD) + peer) + target
        nbytes = tl.where(wanted, nbytes, 0)
        for start in range(0, tl.max(nbytes, axis=0), WIDTH):
            at = (start + tl.arange(0, WIDTH))[None, :]
            mask = at < nbytes[:, None]
            value = tl.load(own.to(tl.pointer_type(tl.uint8))[:, None] + at, mask=mask)
            tl.store(there.to(tl.pointer_type(tl.uint8))[:, None] + at, value, mask=mask)

    @triton.jit
    def _put(context, target, source, nbytes, peer, wanted):
        _copy(context, target, source, nbytes, peer, wanted, 4096)

    @triton.jit
    def _put_word(context, target, source, peer, wanted):
        _copy(context, target, source, 4, peer, wanted, 4)

    @triton.jit
    def _make_visible():
        pass

    @triton.jit
    def quiet():
        pass

    @triton.jit
    def _set_signal(context, target, value, peer):
        there = tl.load(context + PEERS + tl.load(context + WORLD) + peer) + target
        tl.atomic_xchg(there.to(tl.pointer_type(tl.int64)), value, sem="release", scope="sys")

else:

    def _extern(name, arguments, types, _semantic):
        signature = tuple(core.dtype(each) for each in types)
        return core.extern_elementwise(
            "", "", arguments, {signature: (name, core.dtype("int32"))}, is_pure=False, _semantic=_semantic
        )

    @core.extern
    def _putmem_nbi_warp(target, source, nbytes, peer, _semantic=None):
        types = ("int64", "int64", "int64", "int32")
        return _extern("nvshmemx_putmem_nbi_warp", [target, source, nbytes, peer], types, _semantic)

    @core.extern
    def _putmem_nbi(target, source, nbytes, peer, _semantic=None):
        types = ("int64", "int64", "int64", "int32")
        return _extern("nvshmem_putmem_nbi", [target, source, nbytes, peer], types, _semantic)

    @core.extern
    def _quiet_of_library(_semantic=None):
        return _extern("nvshmem_quiet", [], (), _semantic)

    @core.extern
    def _signal_op(target, value, operation, peer, _semantic=None):
        types = ("int64", "int64", "int32", "int32")
        return _extern("nvshmemx_signal_op", [target, value, operation, peer], types, _semantic)

    @triton.jit
    def _addressed(context, target, source, nbytes, peer, wanted):
        """What is not wanted becomes nothing, put to this rank itself: a call in a branch is not to be had."""
        rank = tl.load(context + RANK)
        base = tl.load(context + PEERS + rank)
        there = tl.where(wanted, peer, rank).to(tl.int32)
        return base + target, base + source, tl.where(wanted, nbytes, 0).to(tl.int64), there

    @triton.jit
    def _put(context, target, source, nbytes, peer, wanted):
        """Each warp puts from one offset of the buffer to another; offsets and wanted: blocks of a value a thread."""
        target, source, nbytes, peer = _addressed(context, target, source, nbytes, peer, wanted)
        _putmem_nbi_warp(target, source, nbytes, peer)

    @triton.jit
    def _put_word(context, target, source, peer, wanted):
        """Each thread puts four bytes."""
        target, source, nbytes, peer = _addressed(context, target, source, 4, peer, wanted)
        _putmem_nbi(target, source, nbytes, peer)

    @triton.jit
    def _make_visible():
        """What this thread has stored, to a network card too, once another thread has asked it to send that."""
        tl.inline_asm_elementwise("fence.acq_rel.sys; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def quiet():
        _quiet_of_library()

    @triton.jit
    def _set_signal(context, target, value, peer):
        base = tl.load(context + PEERS + tl.load(context + RANK))
        _signal_op(base + target, value, tl.full((), _SET, tl.int32), peer.to(tl.int32))


@triton.jit
def _is_put(context, peer):
    return tl.load(context + PEERS + peer) == 0


@triton.jit
def _warp_of_thread():
    return tl.arange(0, _WARPS * _LANES) // _LANES


@Kernel
@triton.jit
def _signal(context, ticket, FLAGS: tl.constexpr, PLANE: tl.constexpr):
    peer = tl.program_id(0).to(tl.int64)
    if is_alive(context) & _is_put(context, peer):
        index = flag_index(context, ticket, FLAGS, PLANE) + tl.load(context + RANK)
        _set_signal(context, tl.load(context + FLAGS) + index * 8, tl.load(ticket), peer)


@Kernel
@triton.jit(do_not_specialize=["entries"])
def _put_routing(context, ticket, entries, TOP_K: tl.constexpr):
    peer = tl.program_id(0).to(tl.int64)
    if is_alive(context) & _is_put(context, peer):
        warp = _warp_of_thread()
        source = slot_of(context, ticket) * tl.load(context + WORLD) + tl.load(context + RANK)
        first = source * tl.load(context + MAX_TOKENS) * TOP_K * 4
        share = tl.cdiv(tl.cdiv(entries * 4, 16), _WARPS) * 16
        start = (warp * share).to(tl.int64)
        nbytes = tl.minimum(tl.maximum(entries * 4 - start, 0), share)
        for_experts = tl.load(context + DISPATCH_EXPERTS) + first + start
        for_weights = tl.load(context + DISPATCH_WEIGHTS) + first + start
        for_count = start * 0 + tl.load(context + DISPATCH_COUNTS) + source * 4
        _put(context, for_experts, for_experts, nbytes, peer, nbytes > 0)
        _put(context, for_weights, for_weights, nbytes, peer, nbytes > 0)
        _put(context, for_count, for_count, 4, peer, warp == 0)
        quiet()


@triton.jit
def put_staged_rows(
    context, order, experts, start, total, first_row,
    STRIDE: tl.constexpr, NBYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, TOP_K: tl.constexpr,
    NUM_LOCAL_EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Of the rows that this program of dispatch has just stored, put those that it has staged: ``NBYTES`` each,
    ``STRIDE`` apart, and their scales."""
    _make_visible()
    tl.debug_barrier()
    for first in range(start, start + BLOCK_ROWS, _WARPS):
        place = first + _warp_of_thread()
        in_range = place < total
        entry = tl.load(order + place, mask=in_range, other=0)
        peer = tl.load(experts + entry, mask=in_range, other=0) // NUM_LOCAL_EXPERTS
        wanted = in_range & _is_put(context, peer)
        row = first_row + entry // TOP_K
        at = tl.load(context + DISPATCH_ROWS) + row * STRIDE
        _put(context, at, at, NBYTES, peer, wanted)
        if SCALE_BYTES > 0:
            at = tl.load(context + DISPATCH_SCALES) + row * SCALE_BYTES
            _put(context, at, at, SCALE_BYTES, peer, wanted)


@triton.jit
def put_staged_sums(
    context, turns, slot, start, rows, NBYTES: tl.constexpr, TOP_K: tl.constexpr, BLOCK_ROWS: tl.constexpr
):  # fmt: skip
    """Of the sums that this program of combine has just stored, put those that it has staged."""
    _make_visible()
    tl.debug_barrier()
    max_tokens = tl.load(context + MAX_TOKENS)
    for first in range(start, start + BLOCK_ROWS, _WARPS):
        row = first + _warp_of_thread()
        in_range = row < rows
        turn = tl.load(turns + row, mask=in_range, other=-1)
        owner = tl.where(in_range, row // max_tokens, 0)
        wanted = (turn >= 0) & _is_put(context, owner)
        place = (slot * max_tokens + row % max_tokens) * TOP_K + turn
        target = tl.load(context + COMBINE_ROWS) + place * NBYTES
        source = tl.load(context + COMBINE_STAGED_ROWS) + (slot * rows + row) * NBYTES
        _put(context, target, source, NBYTES, owner, wanted)


@Kernel
@triton.jit(do_not_specialize=["entries"])
def _put_scalars(context, ticket, places, entries, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    if is_alive(context):
        slot, max_tokens = slot_of(context, ticket), tl.load(context + MAX_TOKENS)
        for start in range(tl.program_id(0) * BLOCK, entries, tl.num_programs(0) * BLOCK):
            entry = start + tl.arange(0, BLOCK)
            in_range = entry < entries
            row = entry // TOP_K
            owner = tl.where(in_range, row // max_tokens, 0)
            wanted = (tl.load(places + entry, mask=in_range, other=-1) >= 0) & _is_put(context, owner)
            place = (slot * max_tokens + row % max_tokens) * TOP_K + entry % TOP_K
            target = tl.load(context + COMBINE_SCALARS) + place * 4
            source = tl.load(context + COMBINE_STAGED_SCALARS) + (slot * entries + entry) * 4
            _put_word(context, target, source, owner, wanted)
        quiet()


def _launch(round_: Round) -> Mapping[str, Any]:
    assert round_.puts is not None
    return round_.puts


def signal(round_: Round, flags: tl.constexpr, plane: int) -> None:
    """``protocol.announce`` for the peers that are reached by puts."""
    _signal[(round_.world,)](
        round_.context, round_.ticket, FLAGS=flags.value, PLANE=plane, num_warps=1, **_launch(round_)
    )  # fmt: skip


def put_routing(round_: Round, entries: int, top_k: int) -> None:
    """Put this rank's routing, as its own slot has it."""
    _put_routing[(round_.world,)](
        round_.context, round_.ticket, entries, TOP_K=top_k, num_warps=WARPS, **_launch(round_)
    )  # fmt: skip


def put_scalars(round_: Round, places: Tensor) -> None:
    """Put the staged gradients of ``combine.push_weight_gradients``."""
    _put_scalars[(round_.programs,)](
        round_.context, round_.ticket, places, places.numel(), TOP_K=places.shape[1], BLOCK=32 * WARPS,
        num_warps=WARPS, **_launch(round_),
    )  # fmt: skip
