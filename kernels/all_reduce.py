"""All-reduce: the rows of all ranks summed at every rank, for tensor-parallel inference.

Two forms. One shot: every rank stores its rows at all others, and each sums them for itself; one wait, and W - 1 times
the bytes leave a rank. Two shots: rank r sums the r-th part of everybody's rows and stores the sums at all ranks (a
reduce-scatter and an all-gather); two waits, and 2 (W - 1) / W times the bytes leave. Both add in float32, rank 0
first, and round once, so that they agree with each other, and all ranks, bit for bit.

A round is two kernels. The first runs on the communication stream and does all that goes to peers; the second takes
the sums out of the slot. Program p of either works on the p-th share of the rows, and waits for what program p of other
ranks has stored: no program waits for another one of its own kernel, so they need not be resident together.

The forms are those of NCCL's and vLLM's all-reduces inside a node; numbering rounds, so that nothing is reset and no
barrier ends them, is what protocol.py says.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launchable import Kernel
from .machine import INTERPRETED, ceil_div, nanoseconds, padded
from .protocol import (
    CODE_TIMEOUT,
    CODE_TOKENS_DIFFER,
    DEPTH,
    EPOCH,
    GATHER_ARRIVAL,
    MAX_TOKENS,
    PEERS,
    PUSHED,
    RANK,
    REDUCE_ARRIVAL,
    REDUCE_COUNTS,
    REDUCE_CREDIT,
    REDUCE_ROWS,
    REDUCE_SUMS,
    TICKET_EPOCH,
    TICKET_FINISHED,
    TIMEOUT_NANOSECONDS,
    WORLD,
    fail,
    is_alive,
    own_region,
    pace,
    row_pointers,
    slot_of,
)

UNIT_BYTES = 16  # of a load, where rows divide into those
WARPS = 16
# Units that a program has in flight: 64 KB of a copy; of a sum as much from so many sources at once.
COPIED_AT_ONCE = 64 * 1024 // UNIT_BYTES
SUMMED_IN_START = {"SUMMED": 2048, "SOURCES": 2}  # by few programs
SUMMED_IN_FINISH = {"SUMMED": 1024, "SOURCES": 4}
# Below so many units for each, fewer programs share the work.
UNITS_OF_PROGRAM = 16 if INTERPRETED else 1024
FEWEST_LANES = 32


def unit_of(hidden: int, itemsize: int) -> int:
    """Elements that are moved together: 16 bytes, or the most into which rows of that size divide."""
    return math.gcd(hidden, UNIT_BYTES // itemsize)


@triton.jit
def _units_at(context, rank, REGION: tl.constexpr, unit, UNIT: tl.constexpr, DTYPE: tl.constexpr):
    """Pointers [BLOCK, UNIT] to the elements of units of a region at a rank."""
    return row_pointers(context, rank, REGION, unit, UNIT, DTYPE)[:, None] + tl.arange(0, UNIT)[None, :]


@triton.jit
def _elements(unit, UNIT: tl.constexpr):
    """Where the elements of units lie in a tensor."""
    return unit.to(tl.int64)[:, None] * UNIT + tl.arange(0, UNIT)[None, :]


@triton.jit
def _share(first, end, program, programs):
    """What one of so many programs takes of the units from ``first`` to ``end``."""
    share = tl.cdiv(end - first, programs)
    return first + program * share, tl.minimum(first + (program + 1) * share, end)


@triton.jit
def _raise_flags(
    context, epoch, slot, FLAGS: tl.constexpr, program, FLAGS_OF_RANK: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Raise this rank's flag of a program at every rank: what the program has done before is visible to who sees it."""
    peer = tl.arange(0, LANES)
    world = tl.load(context + WORLD)
    index = (slot * world + tl.load(context + RANK)) * FLAGS_OF_RANK + program
    there = tl.load(context + PEERS + peer, mask=peer < world, other=0) + tl.load(context + FLAGS) + index * 8
    value = tl.zeros((LANES,), tl.int64) + epoch
    tl.debug_barrier()
    tl.atomic_xchg(there.to(tl.pointer_type(tl.int64)), value, mask=peer < world, sem="release", scope="sys")


@triton.jit
def _await_flags(
    context, epoch, slot, expected, FLAGS: tl.constexpr, program, FLAGS_OF_RANK: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Wait until every rank has raised its flag of a program to ``expected``, or report the first that has not."""
    peer = tl.arange(0, LANES)
    world = tl.load(context + WORLD)
    flags = own_region(context, FLAGS, tl.int64) + (slot * world + peer) * FLAGS_OF_RANK + program
    if is_alive(context):
        timeout = tl.load(context + TIMEOUT_NANOSECONDS)
        start = nanoseconds()
        waited = start - start
        seen = tl.where(peer < world, tl.load(flags, mask=peer < world, other=0, volatile=True), expected)
        # It does not ask meanwhile whether another program has failed the context: with Triton 3.9 that spills.
        while (tl.min(seen) < expected) & (waited < timeout):
            seen = tl.where(peer < world, tl.load(flags, mask=peer < world, other=0, volatile=True), expected)
            waited = nanoseconds() - start
        # Polling is relaxed; then each flag is acquired, by one thread, and the barrier hands that on to the others.
        nothing = tl.zeros((LANES,), tl.int64)
        tl.atomic_add(flags, nothing, mask=peer < world, sem="acquire", scope="sys")
        tl.debug_barrier()
        if tl.min(seen) < expected:
            late = tl.min(tl.where(seen < expected, peer, LANES))
            value = tl.max(tl.where(peer == late, seen, 0))
            fail(context, CODE_TIMEOUT, late.to(tl.int64), tl.full((), FLAGS, tl.int64), epoch, expected, value)


@triton.jit
def _compare_tokens(context, epoch, slot, tokens, LANES: tl.constexpr):
    """Fail the context if a rank has given another number of tokens; its flag of program 0 has been awaited."""
    peer = tl.arange(0, LANES)
    world = tl.load(context + WORLD)
    counts = tl.load(own_region(context, REDUCE_COUNTS, tl.int64) + slot * world + peer, mask=peer < world, other=0)
    differs = (peer < world) & (counts != tokens)
    if is_alive(context) & (tl.max(differs.to(tl.int32)) > 0):
        first = tl.min(tl.where(differs, peer, LANES))
        given = tl.max(tl.where(peer == first, counts, 0))
        phase = tl.full((), REDUCE_ARRIVAL, tl.int64)
        fail(context, CODE_TOKENS_DIFFER, first.to(tl.int64), phase, epoch, tokens.to(tl.int64), given)


@triton.jit
def _sum_sources(
    context, slot, source_units, own, unit, last, UNIT: tl.constexpr, DTYPE: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    """float32 sums [BLOCK, UNIT] of ``own`` and what the others have stored here below ``last``, rank 0 first."""
    world, rank = tl.load(context + WORLD).to(tl.int32), tl.load(context + RANK)
    first_source = slot * world
    total = tl.zeros((unit.shape[0], UNIT), tl.float32)
    for start in range(0, world, AT_ONCE):
        loaded = ()
        for step in tl.static_range(AT_ONCE):
            source = start + step
            pointers = _units_at(context, rank, REDUCE_ROWS, (first_source + source) * source_units + unit, UNIT, DTYPE)
            mask = (unit < tl.where((source < world) & (source != rank), last, 0))[:, None]
            loaded += (tl.load(pointers, mask=mask, other=0.0),)  # type: ignore[assignment]
        for step in tl.static_range(AT_ONCE):
            total += tl.where(start + step == rank, own, loaded[step]).to(tl.float32)  # type: ignore[misc]
    return total


@Kernel
@triton.jit(do_not_specialize=["tokens", "source_units"])
def _start_reduce(
    context, ticket, values, tokens, source_units,
    HIDDEN: tl.constexpr, UNIT: tl.constexpr, TWO_SHOT: tl.constexpr, FLAGS_OF_RANK: tl.constexpr,
    LANES: tl.constexpr, PACED: tl.constexpr, COPIED: tl.constexpr, SUMMED: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Store this rank's rows where they are summed; in two shots also sum what is this rank's, and store the sums."""
    program = tl.program_id(0)
    world, rank = tl.load(context + WORLD).to(tl.int32), tl.load(context + RANK).to(tl.int32)
    depth = tl.load(context + DEPTH)
    # The last program to end makes it the context's epoch.
    epoch = tl.load(context + EPOCH) + 1
    slot = epoch % depth
    element: tl.constexpr = values.dtype.element_ty
    UNIT_SIZE: tl.constexpr = UNIT * element.primitive_bitwidth // 8
    units = tokens * (HIDDEN // UNIT)
    part = tl.cdiv(units, world) if TWO_SHOT else units
    first, end = _share(0, part, program, tl.num_programs(0))
    own_source = (slot * world + rank) * source_units
    _await_flags(context, epoch, slot, epoch - depth, REDUCE_CREDIT, 0, 1, LANES)
    if is_alive(context):
        if program == 0:
            peer = tl.arange(0, LANES)
            counts = tl.load(context + PEERS + peer, mask=peer < world, other=0) + tl.load(context + REDUCE_COUNTS)
            counts += (slot * world + rank) * 8
            count = tl.zeros((LANES,), tl.int64) + tokens
            tl.store(counts.to(tl.pointer_type(tl.int64)), count, mask=peer < world)
        if TWO_SHOT:
            for turn in range(1, world):
                owner = (rank + turn) % world
                before = owner * part
                last = tl.minimum(end, units - before)
                for start in range(first, last, COPIED):
                    unit = start + tl.arange(0, COPIED)
                    mask = (unit < last)[:, None]
                    loaded = tl.load(values + _elements(before + unit, UNIT), mask=mask)
                    tl.store(_units_at(context, owner, REDUCE_ROWS, own_source + unit, UNIT, element), loaded, mask)
                if PACED:
                    pace(context, tl.maximum(last - first, 0).to(tl.int64) * UNIT_SIZE)
        else:
            for start in range(first, end, COPIED):
                unit = start + tl.arange(0, COPIED)
                mask = (unit < end)[:, None]
                loaded = tl.load(values + _elements(unit, UNIT), mask=mask)
                for turn in range(1, world):
                    owner = (rank + turn) % world
                    tl.store(_units_at(context, owner, REDUCE_ROWS, own_source + unit, UNIT, element), loaded, mask)
            if PACED:
                pace(context, tl.maximum(end - first, 0).to(tl.int64) * UNIT_SIZE * (world - 1))
        _raise_flags(context, epoch, slot, REDUCE_ARRIVAL, program, FLAGS_OF_RANK, LANES)
    if TWO_SHOT:
        _await_flags(context, epoch, slot, epoch, REDUCE_ARRIVAL, program, FLAGS_OF_RANK, LANES)
        if program == 0:
            _compare_tokens(context, epoch, slot, tokens, LANES)
        if is_alive(context):
            before = rank * part
            last = tl.minimum(end, units - before)
            sums = slot * tl.load(context + MAX_TOKENS) * (HIDDEN // UNIT) + before
            for start in range(first, last, SUMMED):
                unit = start + tl.arange(0, SUMMED)
                mask = (unit < last)[:, None]
                own = tl.load(values + _elements(before + unit, UNIT), mask=mask, other=0.0)
                total = _sum_sources(context, slot, source_units, own, unit, last, UNIT, element, SOURCES).to(element)
                for turn in range(1, world + 1):
                    reader = (rank + turn) % world
                    tl.store(_units_at(context, reader, REDUCE_SUMS, sums + unit, UNIT, element), total, mask)
            if PACED:
                pace(context, tl.maximum(last - first, 0).to(tl.int64) * UNIT_SIZE * (world - 1))
            _raise_flags(context, epoch, slot, GATHER_ARRIVAL, program, FLAGS_OF_RANK, LANES)
    tl.debug_barrier()
    ended = tl.atomic_add(context + PUSHED, tl.full((), 1, tl.int64), sem="acq_rel", scope="gpu")
    if ended == tl.num_programs(0) - 1:
        tl.store(context + PUSHED, tl.full((), 0, tl.int64))
        tl.store(context + EPOCH, epoch)
        tl.store(ticket + TICKET_EPOCH, epoch)
        tl.store(ticket + TICKET_FINISHED, tl.full((), 0, tl.int64))


@Kernel
@triton.jit(do_not_specialize=["tokens", "source_units"])
def _finish_reduce(
    context, ticket, values, residual, result, tokens, source_units,
    HIDDEN: tl.constexpr, UNIT: tl.constexpr, TWO_SHOT: tl.constexpr, FLAGS_OF_RANK: tl.constexpr,
    LANES: tl.constexpr, SUMMED: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Take the sums out of the slot, or sum what is in it, and release it. Several programs may share a flag."""
    program, piece = tl.program_id(0), tl.program_id(1)
    world, rank = tl.load(context + WORLD).to(tl.int32), tl.load(context + RANK).to(tl.int32)
    epoch = tl.load(ticket + TICKET_EPOCH)
    slot = slot_of(context, ticket)
    element: tl.constexpr = result.dtype.element_ty
    units = tokens * (HIDDEN // UNIT)
    part = tl.cdiv(units, world) if TWO_SHOT else units
    first, end = _share(0, part, program, tl.num_programs(0))
    first, end = _share(first, tl.maximum(first, end), piece, tl.num_programs(1))
    if TWO_SHOT:
        _await_flags(context, epoch, slot, epoch, GATHER_ARRIVAL, program, FLAGS_OF_RANK, LANES)
    else:
        _await_flags(context, epoch, slot, epoch, REDUCE_ARRIVAL, program, FLAGS_OF_RANK, LANES)
        if (program == 0) & (piece == 0):
            _compare_tokens(context, epoch, slot, tokens, LANES)
    alive = is_alive(context)
    sums = slot * tl.load(context + MAX_TOKENS) * (HIDDEN // UNIT)
    for owner in range(0, world if TWO_SHOT else 1):
        before = owner * part
        last = tl.minimum(end, units - before)
        for start in range(first, last, SUMMED):
            unit = start + tl.arange(0, SUMMED)
            mask = (unit < last)[:, None]
            at = _elements(before + unit, UNIT)
            if TWO_SHOT:
                pointers = _units_at(context, rank, REDUCE_SUMS, sums + before + unit, UNIT, element)
                total = tl.load(pointers, mask=mask, other=0.0)
            else:
                own = tl.load(values + at, mask=mask, other=0.0)
                total = _sum_sources(context, slot, source_units, own, unit, last, UNIT, element, SOURCES).to(element)
            if residual is not None:
                # Rounded before it is added, so that the result is bit for bit that of a separate addition.
                total = (tl.load(residual + at, mask=mask, other=0.0).to(tl.float32) + total.to(tl.float32)).to(element)
            tl.store(result + at, tl.where(alive, total, float("nan")).to(element), mask=mask)
    tl.debug_barrier()
    ended = tl.atomic_add(ticket + TICKET_FINISHED, tl.full((), 1, tl.int64), sem="acq_rel", scope="gpu")
    # What follows is loaded again: kept over the loop, Triton 3.5's assembler would put it on the stack.
    if (ended == tl.num_programs(0) * tl.num_programs(1) - 1) & is_alive(context):
        _raise_flags(context, tl.load(ticket + TICKET_EPOCH), slot_of(context, ticket), REDUCE_CREDIT, 0, 1, LANES)


class Reducer:
    """What all-reduces of rows [T, hidden] over one context are launched by; ticket and context: see protocol.py.

    world: ranks. programs: of 16 warps each, one a multiprocessor, what communication may take of the GPU; a rank has
    as many flags. finish_programs: what taking the sums may take. source_units: of the region of each source. paced:
    see ``protocol.Round``.
    """

    def __init__(
        self,
        context: Tensor,
        world: int,
        programs: int,
        finish_programs: int,
        source_units: int,
        hidden: int,
        itemsize: int,
        paced: bool = False,
    ) -> None:
        self.context, self.source_units = context, source_units
        self._world, self._programs, self._finish_programs = world, programs, finish_programs
        self._units_of_row = hidden // unit_of(hidden, itemsize)
        constants = {
            "HIDDEN": hidden, "UNIT": unit_of(hidden, itemsize), "FLAGS_OF_RANK": programs,
            "LANES": max(padded(world), FEWEST_LANES), "num_warps": WARPS,
        }  # fmt: skip
        of_start = {**constants, **SUMMED_IN_START, "PACED": paced, "COPIED": COPIED_AT_ONCE}
        of_finish = {**constants, **SUMMED_IN_FINISH}
        either = (False, True)
        self._start = {two_shot: _start_reduce.of_one_form(**of_start, TWO_SHOT=two_shot) for two_shot in either}
        # A residual is another form.
        self._finish = {
            (two_shot, has_residual): _finish_reduce.of_one_form(**of_finish, TWO_SHOT=two_shot)
            for two_shot in either
            for has_residual in either
        }
        self._grids: dict[tuple[int, bool], tuple[int, int]] = {}

    def _grid(self, tokens: int, two_shot: bool) -> tuple[int, int]:
        """Programs that share the rows, and into how many pieces their shares are cut where the sums are taken.

        The same programs at every rank, since each flag is one program's.
        """
        if (tokens, two_shot) not in self._grids:
            units = tokens * self._units_of_row
            part = ceil_div(units, self._world) if two_shot else units
            programs = min(max(ceil_div(part, UNITS_OF_PROGRAM), 1), self._programs)
            wanted = max(ceil_div(units, programs * SUMMED_IN_FINISH["SUMMED"]), 1)
            self._grids[tokens, two_shot] = programs, min(wanted, max(self._finish_programs // programs, 1))
        return self._grids[tokens, two_shot]

    def start(self, ticket: Tensor, rows: Tensor, two_shot: bool, stream: torch.cuda.Stream | None) -> int:
        """Open the round and bring rows [T, H] to where they are summed; in two shots, the sums to every rank.

        Returns how many programs do it, each on a multiprocessor.

        rows: contiguous, aligned. T is the same at every rank. stream: None for the current one; the starts of one
        context must follow one another on one stream.
        """
        tokens = rows.shape[0]
        programs, _ = self._grid(tokens, two_shot)
        self._start[two_shot]((programs,), self.context, ticket, rows, tokens, self.source_units, stream=stream)
        return programs

    def finish(self, ticket: Tensor, rows: Tensor, residual: Tensor | None, two_shot: bool, result: Tensor) -> None:
        """Wait for the sums of all ranks' rows, add a residual where given, and release the slot.

        rows: those of ``start``. residual: [T, H] of their dtype, aligned. result: [T, H], may be the rows; gets the
        same bits at every rank where the residual is the same; NaN once the context has failed.
        """
        tokens = rows.shape[0]
        launch = self._finish[two_shot, residual is not None]
        grid = self._grid(tokens, two_shot)
        launch(grid, self.context, ticket, rows, residual, result, tokens, self.source_units)
