"""All-reduce between ranks that reach each other by load and store, split into a call that starts and one that waits.

    pending = all_reduce.start(partial_sums)
    ...                                        # runs while the sums travel
    y = pending.finish(residual=x)

Nothing waits on the host, and a CUDA graph may capture both. For inference: it has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farskip_fused.checks import DTYPES, check_integer, check_not_capturing, check_tensor, check_tokens
from farskip_fused.errors import UsageError
from farskip_fused.exchange_setup import WARM_UP_TOKENS, load_kernels, share_multiprocessors
from farskip_fused.kernels.all_reduce import Reducer, unit_of
from farskip_fused.kernels.machine import aligned
from farskip_fused.symmetric import SymmetricMemory
from farskip_fused.symmetric.interface import join
from farskip_fused.symmetric.slots import MINIMUM_DEPTH, Rounds, open_once, padded_regions

# One shot as long as a rank's message times the number of ranks is no more: 512 KiB between 4, 256 KiB between 8. Two
# shots send (W - 1) (1 - 2 / W) messages less and cost one more wait for the slowest rank, some 4 us. Between two ranks
# that is nothing less, nor is there less room in the slots. `farskip bench all-reduce` says where both cross.
ONE_SHOT_BYTES_OF_ALL = 2**21
ANY_MESSAGE = 2**62


def largest_in_one_shot(world: int) -> int:
    """Bytes of a rank's rows up to which an all-reduce goes in one shot, unless it is told otherwise."""
    return ANY_MESSAGE if world <= 2 else ONE_SHOT_BYTES_OF_ALL // world


@dataclass(frozen=True)
class ReduceShape:
    """What the slots of an all-reduce must hold; the same at every rank.

    one_shot_bytes: largest message that goes in one shot. programs: of ``Reducer``.
    """

    max_tokens: int
    hidden_size: int
    dtype: torch.dtype
    one_shot_bytes: int
    programs: int
    depth: int = MINIMUM_DEPTH

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("hidden_size", 1), ("one_shot_bytes", 0), ("programs", 1)):
            check_integer(name, getattr(self, name), least)
        if self.dtype not in DTYPES:
            raise TypeError(f"The all-reduce's dtype is {self.dtype}; use bfloat16, float16 or float32.")
        if self.depth < MINIMUM_DEPTH:
            raise UsageError(f"Slots of depth {self.depth} were asked for; the depth must be at least {MINIMUM_DEPTH}.")

    @property
    def one_shot_tokens(self) -> int:
        """Most tokens that go in one shot."""
        return min(self.one_shot_bytes // (self.hidden_size * self.dtype.itemsize), self.max_tokens)

    def source_units(self, world: int) -> int:
        """What a slot has room for of each source: a whole message in one shot, its part in two."""
        of_row = self.hidden_size // unit_of(self.hidden_size, self.dtype.itemsize)
        in_two_shots = -(-self.max_tokens * of_row // world) if self.one_shot_tokens < self.max_tokens else 0
        return max(self.one_shot_tokens * of_row, in_two_shots)

    def regions(self, world: int) -> dict[str, int]:
        """Bytes of each region at one rank."""
        itemsize = self.dtype.itemsize
        source = self.source_units(world) * unit_of(self.hidden_size, itemsize) * itemsize
        message = self.max_tokens * self.hidden_size * itemsize
        flags = self.depth * world * 8
        sizes = {
            "reduce_rows": self.depth * world * source,
            "reduce_sums": self.depth * message if self.one_shot_tokens < self.max_tokens else 0,
            "reduce_counts": flags,
            "reduce_arrival": flags * self.programs,
            "gather_arrival": flags * self.programs,
            "reduce_credit": flags,
        }
        return padded_regions(sizes)


class AllReduce:
    """What all-reduces between the ranks of ``memory`` share; layers of one shape may share one.

    max_tokens: most tokens of one call. hidden_size, dtype: of the rows; any size, bfloat16, float16 or float32, None
        for torch's default.
    depth: all-reduces in flight, at least 2.
    num_comm_sms: multiprocessors that communication may take while others compute; None for 8 of 132.
    one_shot_bytes: largest message, in bytes of one rank's rows, that goes in one shot (``kernels/all_reduce.py``);
        None for 2 MiB divided by the number of ranks, and for any message between two.
    Sums are in float32, rank 0 first, and rounded once: the same bits at every rank, in every run, whatever
    ``one_shot_bytes`` is. Every rank makes the same calls in the same order, with the same number of tokens.
    ``setup`` must be called, on every rank, before the first ``start``.
    Raises UsageError or TypeError for impossible sizes, and UsageError where some ranks are reached by puts only.
    """

    def __init__(
        self,
        memory: SymmetricMemory,
        *,
        max_tokens: int,
        hidden_size: int,
        dtype: torch.dtype | None = None,
        depth: int = MINIMUM_DEPTH,
        num_comm_sms: int | None = None,
        one_shot_bytes: int | None = None,
    ) -> None:
        if memory.by_put:
            raise UsageError(
                "Some ranks of this symmetric memory are reached by puts only, and an all-reduce stores to its peers; "
                "make it among ranks of one node."
            )
        if num_comm_sms is not None and num_comm_sms < 1:
            raise UsageError(f"num_comm_sms is {num_comm_sms}; it must be at least 1.")
        programs, others = share_multiprocessors(memory.device, num_comm_sms)
        dtype = dtype or torch.get_default_dtype()
        if one_shot_bytes is None:
            one_shot_bytes = largest_in_one_shot(memory.world)
        self.memory = memory
        self.shape = ReduceShape(max_tokens, hidden_size, dtype, one_shot_bytes, programs, depth)
        self._finish_programs = programs + others  # nothing else runs on the stream that waits
        self._slots: _Slots | None = None

    def size_hint(self) -> dict[str, int]:
        """Bytes of symmetric memory at each rank by region, and their "total"; allocates nothing."""
        regions = self.shape.regions(self.memory.world)
        return {**regions, "total": sum(regions.values())}

    def setup(self) -> None:
        """Allocate the slots (shared with all-reduces of the same shape) and load every kernel; collective.

        Raises RuntimeError inside CUDA-graph capture, UsageError if the ranks' shapes differ.
        """
        memory, shape = self.memory, self.shape
        check_not_capturing(memory.device)
        load_kernels(memory, self._launch_all)
        self._slots = open_once(memory, shape, lambda: self._make_slots(memory, shape))
        memory.synchronize()
        memory.barrier()

    def _launch_all(self, scratch: SymmetricMemory) -> None:
        # Slots for two shots have room for one of as many tokens, between so few ranks.
        slots = self._make_slots(scratch, replace(self.shape, max_tokens=WARM_UP_TOKENS, one_shot_bytes=0))
        x = torch.zeros(WARM_UP_TOKENS, self.shape.hidden_size, dtype=self.shape.dtype, device=scratch.device)
        for two_shot in (False, True):
            for residual in (None, x):
                PendingSum(slots, x, two_shot).finish(residual=residual)

    def _make_slots(self, memory: SymmetricMemory, shape: ReduceShape) -> _Slots:
        # Kernels are compiled for the number of ranks, which the memory of a warm-up does not have.
        return _Slots(memory, shape, self.memory.world, self._finish_programs)

    def start(self, x: Tensor) -> PendingSum:
        """Launch the sum over all ranks of x [..., H]; returns at once.

        x: this rank's addends, of the all-reduce's dtype and device, any number of tokens up to ``max_tokens``, also
            none; it must not be changed before ``finish``.
        Raises RuntimeError before ``setup``, with ``depth`` all-reduces in flight, and for an x that needs a gradient;
        TypeError for a wrong dtype, UsageError for a wrong shape or device and for too many tokens. From this and from
        ``finish``, PeerTimeout names a lost peer and UsageError a rank that gave another number of tokens.
        """
        if self._slots is None:
            raise RuntimeError("The all-reduce is not set up; call setup() on every rank before the first start().")
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("An all-reduce has no gradient and its input needs one; call it under torch.no_grad().")
        shape = self.shape
        if x.dim() == 0 or x.shape[-1] != shape.hidden_size:
            raise UsageError(f"Addends of {list(x.shape)} were given; [..., {shape.hidden_size}] is needed.")
        if x.dtype != shape.dtype:
            raise TypeError(f"Addends of {x.dtype} were given; the all-reduce is for {shape.dtype}.")
        if x.device != self.memory.device:
            raise UsageError(f"Addends on {x.device} were given; the all-reduce is on {self.memory.device}.")
        rows = x.reshape(-1, shape.hidden_size)
        check_tokens(rows.shape[0], shape.max_tokens)
        pending = PendingSum(self._slots, aligned(rows), rows.shape[0] > shape.one_shot_tokens)
        pending.output_shape = x.shape
        self.memory.check()
        return pending

    def __call__(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """``start`` and ``finish`` in one."""
        return self.start(x).finish(residual=residual)


class PendingSum:
    """An all-reduce in flight; made by ``AllReduce.start``."""

    def __init__(self, slots: _Slots, rows: Tensor, two_shot: bool) -> None:
        self._slots, self._rows, self._two_shot = slots, rows, two_shot
        self._ticket = slots.take_ticket()
        self.output_shape = rows.shape
        self._finished = False
        slots.memory.follow()
        programs = slots.reducer.start(self._ticket.words, rows, two_shot, slots.memory.stream)
        self._mark = slots.memory.mark(programs)

    def landed(self) -> None:
        """Let this stream wait until ``start``'s kernel has run.

        For a CUDA graph that ends between ``start`` and ``finish``: it must have joined the communication stream.
        """
        join(self._mark)
        self._mark = None

    def finish(self, *, residual: Tensor | None = None, in_place: bool = False) -> Tensor:
        """Wait on the device for the sum and return it, shaped as the addends; every rank gets the same bits.

        residual: of the addends' shape and dtype, the same at every rank; added to the rounded sum in the same kernel.
        in_place: put it where the addends are, which then are no more.
        Raises RuntimeError when called twice, TypeError for a residual of a wrong dtype, UsageError for one of a wrong
        shape or device.
        """
        if self._finished:
            raise RuntimeError("finish() was called twice on one pending sum; keep its first result.")
        rows = self._rows
        if residual is not None:
            check_tensor("A residual", residual, self.output_shape, rows, "the all-reduce")
            residual = aligned(residual.reshape(rows.shape))
        self._finished = True
        self.landed()
        result = rows if in_place else torch.empty_like(rows)
        self._slots.reducer.finish(self._ticket.words, rows, residual, self._two_shot, result)
        self._slots.close_round(self._ticket)
        self._slots.memory.check()
        return result.reshape(self.output_shape)


class _Slots(Rounds):
    """world, finish_programs: see ``Reducer``."""

    def __init__(self, memory: SymmetricMemory, shape: ReduceShape, world: int, finish_programs: int) -> None:
        super().__init__(memory, shape.regions(memory.world), depth=shape.depth, max_tokens=shape.max_tokens)
        self.reducer = Reducer(
            self.context, world, shape.programs, finish_programs, shape.source_units(memory.world),
            shape.hidden_size, shape.dtype.itemsize, paced=memory.link_rate is not None,
        )  # fmt: skip
