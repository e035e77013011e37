"""The second reach: peers that no load or store reaches get their rows by NVSHMEM's puts, in kernels of their own.

What is put has been staged in this rank's part of the symmetric buffer: rows and routing where this rank's own would
lie in its own slot, which is the address that they have at the peer too; sums in a region for them. All puts of a
kernel are complete before it ends, and only the kernel after it signals, so the flags mean what they mean elsewhere.

NVSHMEM's calls take many registers and seconds of compile time (a put and its signal: up to 80 registers and 0.5 MB of
code), which is why no other kernel has any. The interpreter has no NVSHMEM and copies between the ranks' memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language import core

from .machine import INTERPRETED, padded
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
    TICKET_FIRST_ROW,
    WORLD,
    Round,
    flag_index,
    is_alive,
    pace,
    slot_of,
)

_SET = tl.constexpr(9)  # NVSHMEM_SIGNAL_SET
# A put holds up its warps until the data has left this rank's memory or, where peers share NVLink, has arrived. So a
# multiprocessor has several in flight: of rows by four warps each, of single words by one.
ROW_WARPS, ROWS_OF_PROGRAM = 4, 4
WORDS_OF_PROGRAM = 16

if INTERPRETED:

    @triton.jit
    def _put(context, target, source, nbytes, peer):
        own = tl.load(context + PEERS + tl.load(context + RANK)) + source
        there = tl.load(context + PEERS + tl.load(context + WORLD) + peer) + target
        for start in range(0, nbytes, 65536):
            at = start + tl.arange(0, 65536)
            value = tl.load(own.to(tl.pointer_type(tl.uint8)) + at, mask=at < nbytes)
            tl.store(there.to(tl.pointer_type(tl.uint8)) + at, value, mask=at < nbytes)

    @triton.jit
    def _quiet():
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
    def _putmem_nbi_block(target, source, nbytes, peer, _semantic=None):
        types = ("int64", "int64", "int64", "int32")
        return _extern("nvshmemx_putmem_nbi_block", [target, source, nbytes, peer], types, _semantic)

    @core.extern
    def _quiet_of_library(_semantic=None):
        return _extern("nvshmem_quiet", [], (), _semantic)

    @core.extern
    def _signal_op(target, value, operation, peer, _semantic=None):
        types = ("int64", "int64", "int32", "int32")
        return _extern("nvshmemx_signal_op", [target, value, operation, peer], types, _semantic)

    @triton.jit
    def _put(context, target, source, nbytes, peer):
        """Put from one offset of the buffer to another; whatever the warps of this program have stored may be put."""
        tl.debug_barrier()
        base = tl.load(context + PEERS + tl.load(context + RANK))
        zero = tl.full((), 0, tl.int64)
        _putmem_nbi_block(base + target, base + source, zero + nbytes, peer.to(tl.int32))

    @triton.jit
    def _quiet():
        _quiet_of_library()

    @triton.jit
    def _set_signal(context, target, value, peer):
        base = tl.load(context + PEERS + tl.load(context + RANK))
        _signal_op(base + target, value, tl.full((), _SET, tl.int32), peer.to(tl.int32))


@triton.jit
def _is_put(context, peer):
    return tl.load(context + PEERS + peer) == 0


@triton.jit
def _signal(context, ticket, FLAGS: tl.constexpr, PLANE: tl.constexpr):
    peer = tl.program_id(0).to(tl.int64)
    if is_alive(context) & _is_put(context, peer):
        index = flag_index(context, ticket, FLAGS, PLANE) + tl.load(context + RANK)
        _set_signal(context, tl.load(context + FLAGS) + index * 8, tl.load(ticket), peer)


@triton.jit(do_not_specialize=["entries"])
def _put_routing(context, ticket, entries, TOP_K: tl.constexpr):
    peer = tl.program_id(0).to(tl.int64)
    if is_alive(context) & _is_put(context, peer):
        source = slot_of(context, ticket) * tl.load(context + WORLD) + tl.load(context + RANK)
        first = source * tl.load(context + MAX_TOKENS) * TOP_K * 4
        for_experts = tl.load(context + DISPATCH_EXPERTS) + first
        for_weights = tl.load(context + DISPATCH_WEIGHTS) + first
        for_count = tl.load(context + DISPATCH_COUNTS) + source * 4
        _put(context, for_experts, for_experts, entries * 4, peer)
        _put(context, for_weights, for_weights, entries * 4, peer)
        _put(context, for_count, for_count, 4, peer)
        _quiet()


@triton.jit
def _put_rows(
    context, ticket, experts, order, entries,
    STRIDE: tl.constexpr, NBYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr, NUM_LOCAL_EXPERTS: tl.constexpr, PLANE: tl.constexpr, PACED: tl.constexpr,
):  # fmt: skip
    if is_alive(context):
        first_row = tl.load(ticket + TICKET_FIRST_ROW + PLANE) + tl.load(context + RANK) * tl.load(context + MAX_TOKENS)
        k = tl.arange(0, TOP_K_PADDED)
        for place in range(tl.program_id(0), tl.load(entries), tl.num_programs(0)):
            entry = tl.load(order + place)
            token = entry // TOP_K
            expert = tl.load(experts + entry)
            peer = expert // NUM_LOCAL_EXPERTS
            if _is_put(context, peer):
                other = tl.load(experts + token * TOP_K + k, mask=k < TOP_K, other=-1)
                at_peer = (other >= 0) & (other // NUM_LOCAL_EXPERTS == peer)
                if tl.min(tl.where(at_peer, other, 2147483647), axis=0) == expert:
                    row = first_row + token
                    at = tl.load(context + DISPATCH_ROWS) + row * STRIDE
                    _put(context, at, at, NBYTES, peer)
                    if SCALE_BYTES > 0:
                        at = tl.load(context + DISPATCH_SCALES) + row * SCALE_BYTES
                        _put(context, at, at, SCALE_BYTES, peer)
                    if PACED:
                        pace(context, tl.full((), NBYTES + SCALE_BYTES, tl.int64))
        _quiet()


@triton.jit(do_not_specialize=["rows"])
def _put_sums(
    context, ticket, turns, rows, NBYTES: tl.constexpr, TOP_K: tl.constexpr, PACED: tl.constexpr
):  # fmt: skip
    if is_alive(context):
        slot, max_tokens = slot_of(context, ticket), tl.load(context + MAX_TOKENS)
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            turn = tl.load(turns + row)
            owner = row // max_tokens
            if (turn >= 0) & _is_put(context, owner):
                place = (slot * max_tokens + row % max_tokens) * TOP_K + turn
                target = tl.load(context + COMBINE_ROWS) + place * NBYTES
                source = tl.load(context + COMBINE_STAGED_ROWS) + (slot * rows + row) * NBYTES
                _put(context, target, source, NBYTES, owner)
                if PACED:
                    pace(context, tl.full((), NBYTES, tl.int64))
        _quiet()


@triton.jit(do_not_specialize=["entries"])
def _put_scalars(context, ticket, places, entries, TOP_K: tl.constexpr):
    if is_alive(context):
        slot, max_tokens = slot_of(context, ticket), tl.load(context + MAX_TOKENS)
        for entry in range(tl.program_id(0), entries, tl.num_programs(0)):
            row = entry // TOP_K
            owner = row // max_tokens
            if (tl.load(places + entry) >= 0) & _is_put(context, owner):
                place = (slot * max_tokens + row % max_tokens) * TOP_K + entry % TOP_K
                target = tl.load(context + COMBINE_SCALARS) + place * 4
                source = tl.load(context + COMBINE_STAGED_SCALARS) + (slot * entries + entry) * 4
                _put(context, target, source, 4, owner)
        _quiet()


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
    _put_routing[(round_.world,)](round_.context, round_.ticket, entries, TOP_K=top_k, **_launch(round_))


def put_rows(
    round_: Round, experts: Tensor, order: Tensor, entries: Tensor, num_local_experts: int, plane: int,
    stride: int, nbytes: int, scale_bytes: int,
) -> None:  # fmt: skip
    """Put this rank's rows, as its own slot has them: ``nbytes`` each, ``stride`` apart, and their scales."""
    top_k = experts.shape[1]
    _put_rows[(round_.programs * ROWS_OF_PROGRAM,)](
        round_.context, round_.ticket, experts, order, entries,
        STRIDE=stride, NBYTES=nbytes, SCALE_BYTES=scale_bytes, TOP_K=top_k, TOP_K_PADDED=padded(top_k),
        NUM_LOCAL_EXPERTS=num_local_experts, PLANE=plane, PACED=round_.paced, num_warps=ROW_WARPS, **_launch(round_),
    )  # fmt: skip


def put_sums(round_: Round, turns: Tensor, top_k: int, nbytes: int) -> None:
    """Put the staged sums of ``combine.push_sums``, rows of ``nbytes``."""
    _put_sums[(round_.programs * ROWS_OF_PROGRAM,)](
        round_.context, round_.ticket, turns, turns.numel(), NBYTES=nbytes, TOP_K=top_k, PACED=round_.paced,
        num_warps=ROW_WARPS, **_launch(round_),
    )  # fmt: skip


def put_scalars(round_: Round, places: Tensor) -> None:
    """Put the staged gradients of ``combine.push_weight_gradients``."""
    _put_scalars[(round_.programs * WORDS_OF_PROGRAM,)](
        round_.context, round_.ticket, places, places.numel(), TOP_K=places.shape[1], num_warps=1, **_launch(round_)
    )
