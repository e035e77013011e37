"""Symmetric buffers that rounds take turns in: their regions, and the context that kernels read them from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from farskip_fused.errors import UsageError
from farskip_fused.kernels import protocol
from farskip_fused.kernels.dispatch import SCALE_COLUMNS
from farskip_fused.symmetric.interface import SymmetricMemory

ALIGNMENT = 256
MINIMUM_DEPTH = 2


@dataclass(frozen=True)
class SlotShape:
    """What the slots must hold.

    max_tokens: tokens a rank, at most. depth: rounds in flight, at least 2: dispatch of one layer overlaps combine of
    the layer before. planes: rows of a token that a round carries, 2 where backward dispatches the inputs again beside
    the gradients. fp8: whether rows may travel as e4m3 with a scale for each 128 columns. staged: whether some rank
    reaches some peer by puts.
    """

    max_tokens: int
    hidden_size: int
    top_k: int
    dtype: torch.dtype
    depth: int = MINIMUM_DEPTH
    planes: int = 1
    fp8: bool = False
    staged: bool = False

    def __post_init__(self) -> None:
        if self.depth < MINIMUM_DEPTH:
            raise UsageError(f"Slots of depth {self.depth} were asked for; the depth must be at least {MINIMUM_DEPTH}.")

    def regions(self, world: int) -> dict[str, int]:
        """Bytes of each region at one rank.

        Capacity is the true worst case: every token of every rank may go to one rank.
        """
        arriving = self.depth * world * self.max_tokens
        leaving = self.depth * self.max_tokens * self.top_k
        row = self.hidden_size * self.dtype.itemsize
        scales = -(-self.hidden_size // SCALE_COLUMNS) * 4 if self.fp8 else 0
        flags = self.depth * world * 8
        sizes = {
            "dispatch_rows": self.planes * arriving * row,
            "dispatch_scales": self.planes * arriving * scales,
            "dispatch_experts": arriving * self.top_k * 4,
            "dispatch_weights": arriving * self.top_k * 4,
            "dispatch_counts": self.depth * world * 4,
            "row_arrival": self.planes * arriving * 4,
            "routing_arrival": flags,
            "rows_arrival": self.planes * flags,
            "dispatch_credit": flags,
            "combine_rows": leaving * row,
            "combine_scalars": leaving * 4,
            "combine_arrival": flags,
            "combine_credit": flags,
            "combine_staged_rows": arriving * row * self.staged,
            "combine_staged_scalars": arriving * self.top_k * 4 * self.staged,
        }
        return padded_regions(sizes)


class Ticket(NamedTuple):
    """A round. number: its place among this process's rounds; words: [TICKET_WORDS] int64 on the device, its epoch and
    where its slot lies, written by a kernel.

    Number and epoch differ once a CUDA graph is replayed: the host's number stays, the epoch goes on.
    """

    number: int
    words: Tensor


class Rounds:
    """A symmetric buffer, the context in which kernels find its regions, and the rounds in flight over it.

    context: int64 device tensor, see ``kernels/protocol.py``.
    """

    def __init__(
        self, memory: SymmetricMemory, regions: Mapping[str, int], *, depth: int, max_tokens: int, planes: int = 1
    ) -> None:
        self.memory, self.depth = memory, depth
        self.buffer = memory.allocate(sum(regions.values()))
        words = [0] * (protocol.PEERS.value + 2 * memory.world)
        words[protocol.TIMEOUT_NANOSECONDS.value] = int(memory.timeout * 1e9)
        words[protocol.STATUS_ADDRESS.value] = memory.status.address
        words[protocol.RANK.value] = memory.rank
        words[protocol.WORLD.value] = memory.world
        words[protocol.DEPTH.value] = depth
        words[protocol.MAX_TOKENS.value] = max_tokens
        words[protocol.PLANES.value] = planes
        words[protocol.LINK_RATE.value] = memory.link_rate or 0
        offset = 0
        for word, name in enumerate(protocol.REGION_NAMES, start=protocol.DISPATCH_ROWS.value):
            words[word] = offset
            offset += regions.get(name, 0)
        reached = [0 if rank in memory.put_to else address for rank, address in enumerate(self.buffer.addresses)]
        words[protocol.PEERS.value :] = reached + self.buffer.addresses
        self.context = torch.tensor(words, dtype=torch.int64, device=memory.device)
        self._opened = 0
        self.open_rounds: set[int] = set()

    def take_ticket(self) -> Ticket:
        """Count a round that takes the slot of the one ``depth`` before it, which must be closed.

        A kernel has to take the epoch into its words.
        """
        number = self._opened + 1
        oldest = min(self.open_rounds, default=number)
        if number - oldest >= self.depth:
            raise RuntimeError(
                f"The oldest of {len(self.open_rounds)} rounds in flight still holds the slot that the next one needs, "
                f"{self.depth} deep; finish it first, or give the layers a larger depth. After an exception in "
                "the middle of a round, close this symmetric memory and open a new one."
            )
        self._opened = number
        self.open_rounds.add(number)
        return Ticket(number, torch.empty(protocol.TICKET_WORDS, dtype=torch.int64, device=self.memory.device))

    def is_newest(self, ticket: Ticket) -> bool:
        """Whether no later round is open. Those of recomputation are closed again when gradients are computed."""
        return ticket.number == max(self.open_rounds, default=ticket.number)

    def close_round(self, ticket: Ticket) -> None:
        self.open_rounds.remove(ticket.number)


class Slots(Rounds):
    """Allocated slots of one shape; every layer of a model that has this shape uses the same ones.

    rows: the region of dispatched rows, [., H].
    """

    def __init__(self, memory: SymmetricMemory, shape: SlotShape) -> None:
        regions = shape.regions(memory.world)
        super().__init__(memory, regions, depth=shape.depth, max_tokens=shape.max_tokens, planes=shape.planes)
        self.shape = shape
        rows = self.buffer.memory[: regions["dispatch_rows"]].view(shape.dtype)
        whole = rows.numel() // shape.hidden_size
        self.rows = rows[: whole * shape.hidden_size].view(whole, shape.hidden_size)

    def open_round(self) -> Ticket:
        """Begin a round."""
        ticket = self.take_ticket()
        protocol.open_round(self.context, ticket.words)
        return ticket


Opened = TypeVar("Opened")


def open_once(memory: SymmetricMemory, shape: Any, make: Callable[[], Opened]) -> Opened:
    """What was made for that shape on this memory, made at the first call; collective.

    Raises UsageError if the ranks ask for different shapes.
    """
    if shape not in memory.buffers:
        for rank, other in enumerate(memory.gather(shape)):
            if other != shape:
                raise UsageError(f"Rank {memory.rank} sets up {shape} and rank {rank} {other}; make the layers equal.")
        memory.buffers[shape] = make()
    return cast(Opened, memory.buffers[shape])


def open_slots(memory: SymmetricMemory, shape: SlotShape) -> Slots:
    """The slots of that shape; see ``open_once``."""
    return open_once(memory, shape, lambda: Slots(memory, shape))


def padded_regions(sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of regions, by name, rounded up to where the next one may begin."""
    return {name: -(-size // ALIGNMENT) * ALIGNMENT for name, size in sizes.items()}
