"""What every backend of symmetric memory offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from farskip_fused.errors import PeerTimeout, UsageError
from farskip_fused.kernels import protocol
from farskip_fused.kernels.library_gemms import Busy
from farskip_fused.kernels.machine import INTERPRETED
from farskip_fused.schedule import COMMUNICATION


class SymmetricBuffer(NamedTuple):
    """A buffer of the same size at every rank.

    memory: [nbytes] uint8, this rank's part, zeros at first.
    addresses: base address of each rank's part, as this rank reaches it by load and store; 0 where it does not.
    """

    memory: Tensor
    addresses: list[int]


class Mark(NamedTuple):
    """What the communication stream had been given up to some moment, and what cuBLAS is told until it is joined."""

    event: torch.Event
    busy: Busy | None


def join(mark: Mark | None) -> None:
    """Let this stream wait for what was marked, if anything was."""
    if mark is not None:
        mark.event.wait()
        if mark.busy is not None:
            mark.busy.end()


class SymmetricMemory(ABC):
    """Memory that all ranks of a group can store to; made by ``farskip_fused.init``.

    Attributes:
    backend, rank, world, device; timeout: seconds that a wait may last.
    stream: where communication is launched, None on CPU.
    put_to: ranks that this one reaches by puts instead of by load and store. by_put: whether any rank has such peers.
    puts: how kernels that put are launched, None where there is nothing to put.
    tells_libraries: whether cuBLAS is told of the multiprocessors that communication takes. It may then choose kernels
        that add in another order; set False for dense layers with the same bits whatever runs beside them.
    link_rate: bytes a microsecond to which stores to peers are paced, so that ranks of one GPU see a slower link; for
        benchmarks alone, set before the first layer is set up. None for as fast as they go.
    """

    backend: str

    def __init__(self, rank: int, world: int, device: torch.device, timeout: float) -> None:
        if device.type == "cpu" and not INTERPRETED:
            raise UsageError(
                "In this process the kernels are compiled for the GPU and cannot serve CPU tensors; put the model on "
                "the GPU, or start the program with CUDA_VISIBLE_DEVICES set to nothing."
            )
        from farskip_fused._C import StatusBlock

        self.rank, self.world, self.device, self.timeout = rank, world, device, timeout
        self.status = StatusBlock()
        self.stream: torch.cuda.Stream | None = None
        self.tells_libraries = True
        self.link_rate: int | None = None
        self.put_to: frozenset[int] = frozenset()
        self.by_put = False
        self.puts: dict[str, Any] | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device, priority=COMMUNICATION.priority)
            torch.cuda.current_stream(device).synchronize()  # the context must exist before memory is mapped into it
            self.status.map_for_device()
        self.buffers: dict[Any, Any] = {}  # slots by shape, see slots.py

    def _reach_by_put(self, ranks: set[int], launch: dict[str, Any]) -> None:
        """Set which ranks are reached by puts, and how kernels that put are launched; collective."""
        self.put_to = frozenset(ranks)
        self.puts = launch if ranks else None
        self.by_put = any(self.gather(bool(ranks)))

    def follow(self) -> None:
        """Let the communication stream wait for what this stream has been given so far.

        The memory's device must be the current one, as it is for whatever launches kernels.
        """
        if self.stream is not None:
            # torch.cuda's wait_stream does the same and looks the device up in Python each time.
            given = torch.Event(self.device)
            given.record()
            given.wait(self.stream)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Launch what comes within on the communication stream, which follows this one."""
        self.follow()
        if self.stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        torch.cuda.set_stream(self.stream)
        try:
            yield
        finally:
            torch.cuda.set_stream(current)

    def mark(self, programs: int) -> Mark | None:
        """What the communication stream has been given so far, which takes so many multiprocessors; for ``join``, until
        which cuBLAS is told of them."""
        if self.stream is None:
            return None
        event = torch.Event(self.device)
        event.record(self.stream)
        return Mark(event, Busy(programs) if programs and self.tells_libraries else None)

    @abstractmethod
    def allocate(self, nbytes: int) -> SymmetricBuffer:
        """Allocate ``nbytes`` of zeros at every rank; collective, in the same order with the same sizes."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """The picklable ``value`` of every rank, on the host; collective."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait on the host until every rank is here."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; collective where the backend needs it. Tensors over the memory must not be used again."""

    def check(self) -> None:
        """Raise what a kernel has reported so far: PeerTimeout, or UsageError for what only kernels see of bad input.

        Costs one read of host memory. Kernels run asynchronously on a GPU, so the report of a wait that expires later
        comes with a later check; ``synchronize`` waits for it.
        """
        if self.status.read() is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # every wait is bounded; afterwards the whole report is there
        report = self.status.read()
        assert report is not None
        if report["code"] == protocol.CODE_EXPERT_OUT_OF_RANGE.value:
            raise UsageError(
                f"Rank {report['rank']} was given expert id {report['seen']} and there are {report['expected']} "
                f"experts; ids must be from 0 to {report['expected'] - 1}, or -1 for not routed."
            )
        if report["code"] == protocol.CODE_TOO_MANY_ENTRIES.value:
            raise UsageError(
                f"The experts of rank {report['rank']} were given {report['seen']} (token, expert) pairs and can take "
                f"{report['expected']}; raise max_pairs. If it was not given, ids repeat within a token's top-k: they "
                "must differ from each other."
            )
        if report["code"] == protocol.CODE_TOKENS_DIFFER.value:
            raise UsageError(
                f"Rank {report['rank']} gave {report['expected']} tokens to the all-reduce of epoch {report['epoch']} "
                f"and rank {report['peer']} gave {report['seen']}; every rank must give the same number."
            )
        phase = protocol.PHASE_NAMES[report["phase"]]
        raise PeerTimeout(
            f"Rank {report['rank']} waited {self.timeout:g} s for rank {report['peer']} in phase '{phase}' of epoch "
            f"{report['epoch']}: expected {report['expected']}, seen {report['seen']}. "
            "Either that rank is gone or late, or the ranks do not issue the same calls in the same order."
        )

    def synchronize(self) -> None:
        """Wait for the device, then ``check``."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.check()


class GroupMemory(SymmetricMemory):
    """Among the processes of a torch.distributed group, which the host's part goes through."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: float) -> None:
        self.group = group
        super().__init__(dist.get_rank(group), dist.get_world_size(group), device, timeout)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        dist.barrier(group=self.group)
