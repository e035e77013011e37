"""What every communicating kernel shares: the context of a symmetric buffer, bounded waits and announcements.

A *round* is one dispatch with the combine that answers it. Every rank opens its rounds in the same order, so that the
epoch, a 64-bit counter in device memory, names the same round everywhere. Round ``e`` uses slot ``e % depth`` of the
dispatch and of the combine buffers.

Flags are epochs, only ever grow, and lie in the memory of the rank that waits for them; nothing is reset:
- ``arrival[slot, source]`` at the reader: the source has written all its data of that epoch;
- ``credit[slot, reader]`` at the writer: the reader has read all data of that epoch, its slot may be written again;
- ``row_arrival[slot, source, token]`` at the reader: this row has been written, for GEMMs that start before the rest.
An all-reduce has such flags too, its arrivals one for each program: all_reduce.py.
A writer of epoch ``e`` waits for the credit of epoch ``e - depth``, which is at or below zero for the first rounds.

Memory order: a flag is raised by an exchange with release semantics at system scope. It covers what its own program
stored before a barrier, what other programs of its kernel stored before they were counted, and everything that the
stream did before. The wait is an atomic read with acquire semantics at system scope, and readers are kernels that
follow it on the same stream.
docs/protocol.md has the whole of it, and why it cannot deadlock.

A wait that expires records what it waited for in host-visible memory and marks the context as failed. In a failed
context nothing waits, nothing is written to a peer, and combine gives NaN, until the host raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launchable import Kernel
from .machine import nanoseconds

# Words of the context, int64, in device memory.
EPOCH = tl.constexpr(0)
FAILED = tl.constexpr(1)
TIMEOUT_NANOSECONDS = tl.constexpr(2)
STATUS_ADDRESS = tl.constexpr(3)
RANK = tl.constexpr(4)
WORLD = tl.constexpr(5)
DEPTH = tl.constexpr(6)
MAX_TOKENS = tl.constexpr(7)
PLANES = tl.constexpr(8)  # rows of a token that a round carries
LINK_RATE = tl.constexpr(9)  # bytes a microsecond to which remote stores are paced, by benchmarks alone
LINK_FREE_AT = tl.constexpr(10)  # nanosecond at which the paced link has sent what was stored so far
EXPIRED = tl.constexpr(11)  # not 0 once a GEMM has waited for a row to its bound: later waits report at once
PUSHED = tl.constexpr(12)  # programs that have stored their share of routing, rows or an all-reduce; 0 between these
# Byte offsets of the regions in every rank's symmetric buffer.
DISPATCH_ROWS = tl.constexpr(13)  # [depth, plane, source, max_tokens, hidden]
DISPATCH_SCALES = tl.constexpr(14)  # [depth, plane, source, max_tokens, hidden / 128] float32, of fp8 rows
DISPATCH_EXPERTS = tl.constexpr(15)  # [depth, source, max_tokens, top_k] int32, global ids
DISPATCH_WEIGHTS = tl.constexpr(16)  # [depth, source, max_tokens, top_k] float32
DISPATCH_COUNTS = tl.constexpr(17)  # [depth, source] int32, tokens
ROW_ARRIVAL = tl.constexpr(18)  # [depth, plane, source, max_tokens] int32, the lower half of the epoch
ROUTING_ARRIVAL = tl.constexpr(19)  # [depth, source] int64
ROWS_ARRIVAL = tl.constexpr(20)  # [depth, plane, source] int64
DISPATCH_CREDIT = tl.constexpr(21)  # [depth, reader] int64
COMBINE_ROWS = tl.constexpr(22)  # [depth, max_tokens, top_k, hidden]
COMBINE_SCALARS = tl.constexpr(23)  # [depth, max_tokens, top_k] float32, gradients of the router weights
COMBINE_ARRIVAL = tl.constexpr(24)  # [depth, writer] int64
COMBINE_CREDIT = tl.constexpr(25)  # [depth, owner] int64
COMBINE_STAGED_ROWS = tl.constexpr(26)  # [depth, owner, max_tokens, hidden], what is put: put.py
COMBINE_STAGED_SCALARS = tl.constexpr(27)  # [depth, owner, max_tokens, top_k] float32
# Those of an all-reduce, which has a buffer of its own: all_reduce.py. A unit is what one load moves.
REDUCE_ROWS = tl.constexpr(28)  # [depth, source, units], what ranks store for this one to sum
REDUCE_SUMS = tl.constexpr(29)  # [depth, units], sums as their owners store them
REDUCE_COUNTS = tl.constexpr(30)  # [depth, source] int64, tokens
REDUCE_ARRIVAL = tl.constexpr(31)  # [depth, source, program] int64
GATHER_ARRIVAL = tl.constexpr(32)  # [depth, owner, program] int64
REDUCE_CREDIT = tl.constexpr(33)  # [depth, reader] int64
# Base address of each rank's buffer as this rank reaches it by load and store, 0 where it does not. After them the same
# once more, as far as memory is shared: the interpreter's puts need it.
PEERS = tl.constexpr(34)

REGION_NAMES = (
    "dispatch_rows",
    "dispatch_scales",
    "dispatch_experts",
    "dispatch_weights",
    "dispatch_counts",
    "row_arrival",
    "routing_arrival",
    "rows_arrival",
    "dispatch_credit",
    "combine_rows",
    "combine_scalars",
    "combine_arrival",
    "combine_credit",
    "combine_staged_rows",
    "combine_staged_scalars",
    "reduce_rows",
    "reduce_sums",
    "reduce_counts",
    "reduce_arrival",
    "gather_arrival",
    "reduce_credit",
)

# Words of a ticket, int64, in device memory.
TICKET_EPOCH = tl.constexpr(0)
TICKET_FIRST_ROW = tl.constexpr(1)  # of plane 0 in the round's dispatch slot; plane 1 follows in the next word
TICKET_FINISHED = tl.constexpr(1)  # of an all-reduce: programs that have read what they need of its slot
TICKET_WORDS = 3

# Words of the status block, int64, in host-visible memory.
STATUS_CODE, STATUS_RANK, STATUS_PEER, STATUS_PHASE, STATUS_EPOCH, STATUS_EXPECTED, STATUS_SEEN = (
    tl.constexpr(word) for word in range(7)
)
CODE_TIMEOUT = tl.constexpr(1)
CODE_EXPERT_OUT_OF_RANGE = tl.constexpr(2)
CODE_TOO_MANY_ENTRIES = tl.constexpr(3)
CODE_TOKENS_DIFFER = tl.constexpr(4)
PHASE_NAMES = {
    DISPATCH_CREDIT.value: "dispatch credit",
    ROUTING_ARRIVAL.value: "routing arrival",
    ROWS_ARRIVAL.value: "rows arrival",
    ROW_ARRIVAL.value: "row arrival",
    COMBINE_CREDIT.value: "combine credit",
    COMBINE_ARRIVAL.value: "combine arrival",
    REDUCE_CREDIT.value: "reduce credit",
    REDUCE_ARRIVAL.value: "reduce arrival",
    GATHER_ARRIVAL.value: "gather arrival",
}


@triton.jit
def region(context, peer, REGION: tl.constexpr, DTYPE: tl.constexpr):
    """Pointer to a region in the buffer of ``peer`` (a scalar or a block of ranks)."""
    address = tl.load(context + PEERS + peer) + tl.load(context + REGION)
    return address.to(tl.pointer_type(DTYPE))


@triton.jit
def own_region(context, REGION: tl.constexpr, DTYPE: tl.constexpr):
    return region(context, tl.load(context + RANK), REGION, DTYPE)


@triton.jit
def row_pointers(context, peer, REGION: tl.constexpr, row, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """Pointers to rows of ``COLUMNS`` elements at ``peer``; both may be blocks of the same shape."""
    NBYTES: tl.constexpr = COLUMNS * DTYPE.primitive_bitwidth // 8
    return pointers_at(tl.load(context + PEERS + peer) + tl.load(context + REGION) + row * NBYTES, NBYTES, DTYPE)


@triton.jit
def pointers_at(address, NBYTES: tl.constexpr, DTYPE: tl.constexpr):
    """Addresses that are multiples of ``NBYTES`` from the start of a region, as pointers.

    Addresses from memory are of unknown alignment to the compiler, which would store element by element.
    """
    ALIGNMENT: tl.constexpr = 16 if NBYTES % 16 == 0 else 8 if NBYTES % 8 == 0 else 4 if NBYTES % 4 == 0 else 1
    return tl.multiple_of(tl.multiple_of(address, ALIGNMENT).to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def slot_of(context, ticket):
    """Slot of the round whose epoch ``ticket`` holds."""
    return tl.load(ticket) % tl.load(context + DEPTH)


@triton.jit
def is_alive(context):
    return tl.load(context + FAILED, volatile=True) == 0


@triton.jit
def fail(context, code, peer, phase, epoch, expected, seen):
    """Mark the context as failed and, for the first failure, tell the host; the code is written last."""
    # An exchange: Triton 3.5 does not compile a compare-and-swap of 64 bits.
    if tl.atomic_xchg(context + FAILED, tl.full((), 1, tl.int64)) == 0:
        status = tl.load(context + STATUS_ADDRESS).to(tl.pointer_type(tl.int64))
        tl.store(status + STATUS_RANK, tl.load(context + RANK))
        tl.store(status + STATUS_PEER, peer)
        tl.store(status + STATUS_PHASE, phase)
        tl.store(status + STATUS_EPOCH, epoch)
        tl.store(status + STATUS_EXPECTED, expected)
        tl.store(status + STATUS_SEEN, seen)
        # A plain store: an atomic on host memory needs PCIe atomics, which not every machine has. The host synchronises
        # once it sees the code, and only then reads the other words.
        tl.debug_barrier()
        tl.store(status + STATUS_CODE, code)


@triton.jit
def pace(context, nbytes):
    """Hold this program until a link of the context's rate would have sent ``nbytes`` more; for benchmarks alone."""
    now = nanoseconds()
    duration = nbytes.to(tl.int64) * 1000 // tl.load(context + LINK_RATE)
    tl.atomic_max(context + LINK_FREE_AT, now, sem="relaxed", scope="gpu")
    end = tl.atomic_add(context + LINK_FREE_AT, duration, sem="relaxed", scope="gpu") + duration
    while now < end:
        now = nanoseconds()


@Kernel
@triton.jit
def _open_round(context, ticket):
    epoch = tl.load(context + EPOCH) + 1
    tl.store(context + EPOCH, epoch)
    tl.store(ticket + TICKET_EPOCH, epoch)
    plane_rows = tl.load(context + WORLD) * tl.load(context + MAX_TOKENS)
    first = epoch % tl.load(context + DEPTH) * tl.load(context + PLANES) * plane_rows
    tl.store(ticket + TICKET_FIRST_ROW, first)
    tl.store(ticket + TICKET_FIRST_ROW + 1, first + plane_rows)


@triton.jit
def flag_index(context, ticket, FLAGS: tl.constexpr, PLANE: tl.constexpr):
    """Index of the flag of rank 0 in this round's slot."""
    slot = slot_of(context, ticket)
    if FLAGS == ROWS_ARRIVAL:
        slot = slot * tl.load(context + PLANES) + PLANE
    return slot * tl.load(context + WORLD)


@triton.jit
def await_flag(context, ticket, peer, FLAGS: tl.constexpr, IS_CREDIT: tl.constexpr, PLANE: tl.constexpr):
    """Wait for one flag of this round, to the bound."""
    epoch = tl.load(ticket)
    expected = epoch
    if IS_CREDIT:
        expected = epoch - tl.load(context + DEPTH)
    flag = own_region(context, FLAGS, tl.int64) + flag_index(context, ticket, FLAGS, PLANE) + peer
    if is_alive(context):
        expired = tl.load(context + EXPIRED) != 0
        timeout = tl.where(expired, 0, tl.load(context + TIMEOUT_NANOSECONDS))
        start = nanoseconds()
        waited = start - start
        seen = tl.atomic_add(flag, tl.full((), 0, tl.int64), sem="acquire", scope="sys")
        while (seen < expected) & (waited < timeout):
            seen = tl.atomic_add(flag, tl.full((), 0, tl.int64), sem="acquire", scope="sys")
            waited = nanoseconds() - start
        # A row that came after a GEMM had given it up is as bad as none.
        if (seen < expected) | expired:
            fail(context, CODE_TIMEOUT, peer, tl.full((), FLAGS, tl.int64), epoch, expected, seen)


@Kernel
@triton.jit
def _wait(context, ticket, FLAGS: tl.constexpr, IS_CREDIT: tl.constexpr, PLANE: tl.constexpr):
    await_flag(context, ticket, tl.program_id(0).to(tl.int64), FLAGS, IS_CREDIT, PLANE)


@triton.jit
def raise_flag(context, ticket, peer, FLAGS: tl.constexpr, PLANE: tl.constexpr):
    """Raise this rank's flag at a peer that stores reach; covers what this program has seen done, behind a barrier."""
    index = flag_index(context, ticket, FLAGS, PLANE) + tl.load(context + RANK)
    tl.atomic_xchg(region(context, peer, FLAGS, tl.int64) + index, tl.load(ticket), sem="release", scope="sys")


@Kernel
@triton.jit
def _announce(context, ticket, FLAGS: tl.constexpr, PLANE: tl.constexpr):
    peer = tl.program_id(0)
    if is_alive(context) & (tl.load(context + PEERS + peer) != 0):
        raise_flag(context, ticket, peer, FLAGS, PLANE)


class Round(NamedTuple):
    """A round as kernels see it.

    context, ticket: see above, on the device. world: ranks. programs: of 16 warps each, one a multiprocessor, what
    communication may take of the GPU. paced: whether stores to peers keep to the context's link rate. puts: how kernels
    with NVSHMEM's calls are launched, None where every peer is reached by load and store.
    """

    context: Tensor
    ticket: Tensor
    world: int
    programs: int
    paced: bool = False
    puts: Mapping[str, Any] | None = None


class SlotRows(NamedTuple):
    """Rows that a kernel gathers from the dispatch slot of a round, instead of from memory of this rank alone.

    Row ``r`` of the slot is row ``ticket[TICKET_FIRST_ROW + plane] + r`` of the region. arrived: whether somebody has
    waited for all of them; otherwise kernels may wait for each row's own flag, which only stores raise.
    """

    round_: Round
    plane: int = 0
    arrived: bool = False

    def wait(self) -> SlotRows:
        """Wait for all of them, unless somebody has."""
        if not self.arrived:
            wait_arrival(self.round_, ROWS_ARRIVAL, self.plane)
        return self._replace(arrived=True)


def open_round(context, ticket) -> None:
    """Take the next epoch into ``ticket`` ([TICKET_WORDS] int64); all later kernels of the round read it there."""
    _open_round[(1,)](context, ticket)


def wait_credit(round_: Round, flags: tl.constexpr) -> None:
    """Wait until every reader has released the slot that this round writes."""
    _wait[(round_.world,)](round_.context, round_.ticket, FLAGS=flags.value, IS_CREDIT=True, PLANE=0, num_warps=1)


def wait_arrival(round_: Round, flags: tl.constexpr, plane: int = 0) -> None:
    """Wait until every writer has announced this round."""
    _wait[(round_.world,)](round_.context, round_.ticket, FLAGS=flags.value, IS_CREDIT=False, PLANE=plane, num_warps=1)


def announce(round_: Round, flags: tl.constexpr, plane: int = 0) -> None:
    """Raise this rank's flag at every rank: what this stream did before is visible to whoever sees it."""
    _announce[(round_.world,)](round_.context, round_.ticket, FLAGS=flags.value, PLANE=plane, num_warps=1)
    if round_.puts is not None:
        from .put import signal

        signal(round_, flags, plane)
