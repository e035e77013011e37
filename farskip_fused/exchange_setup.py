"""From a layer's sizes and options to its exchange: slots allocated, every kernel loaded."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farskip_fused.errors import UsageError
from farskip_fused.flight import Exchange
from farskip_fused.kernels import dispatch
from farskip_fused.kernels.launchable import compile_ahead
from farskip_fused.kernels.machine import INTERPRETED
from farskip_fused.kernels.tiles import choose_tile_rows
from farskip_fused.schedule import COMMUNICATION
from farskip_fused.symmetric import SymmetricMemory
from farskip_fused.symmetric.local import LocalMemory
from farskip_fused.symmetric.slots import Slots, SlotShape, open_slots

WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class ExchangeOptions:
    """How rows travel between ranks.

    num_comm_sms: multiprocessors that communication may take while GEMMs run; None for 8 of 132, and 16 where peers are
        reached by puts (measured between GPUs of a host alone).
    keep_received: in training, copy received rows out of the slots for backward. Otherwise backward dispatches them
        again: more traffic, and no memory of the layer's own, but slots twice as large.
    combine: "direct", where the down-projection stores every row at the owner of its token, as it is computed, and
        results are the same for any number of ranks; or "presummed", where each rank sums a token's rows first and one
        row a rank and token travels: fewer bytes, behind the GEMM instead of during it, for links below some 200 GB/s.
        The rows wait in [pairs, H] of their own, see ``max_pairs``. Always so where peers are reached by puts.
    fp8: rows of the forward pass travel as e4m3 with a float32 scale for each 128 columns.
    max_pairs: (token, expert) pairs that the experts of a rank take in one call; more raise UsageError. None for as
        many as all tokens of all ranks can give, for which memory is then set aside.
    Raises UsageError for values that cannot be, and for fp8 without ``keep_received``.
    """

    num_comm_sms: int | None = None
    keep_received: bool = True
    combine: str = "direct"
    fp8: bool = False
    max_pairs: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("num_comm_sms", self.num_comm_sms), ("max_pairs", self.max_pairs)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1.")
        if self.combine not in ("direct", "presummed"):
            raise UsageError(f"combine is {self.combine!r}; it must be 'direct' or 'presummed'.")
        if self.fp8 and not self.keep_received:
            raise UsageError("fp8 was given with keep_received=False; rows that travel as fp8 are kept widened.")


def size_hint(shape: SlotShape, world: int) -> dict[str, int]:
    """Bytes of symmetric memory at each rank by region, and their "total"."""
    regions = shape.regions(world)
    return {**regions, "total": sum(regions.values())}


def set_up(
    memory: SymmetricMemory,
    shape: SlotShape,
    num_experts: int,
    options: ExchangeOptions,
    warm_up: Callable[[Exchange], None],
) -> Exchange:
    """Allocate the slots (shared with layers of the same shape) and load every kernel; collective.

    warm_up: launches every variant of every kernel, on at most WARM_UP_TOKENS tokens; see ``load_kernels``.
    """

    def launch_all(scratch: SymmetricMemory) -> None:
        small = open_slots(scratch, replace(shape, max_tokens=WARM_UP_TOKENS))
        warm_up(_new_exchange(small, memory.world, shape, num_experts, options))
        dispatch.load_orders(memory.device, num_experts)

    load_kernels(memory, launch_all)
    exchange = _new_exchange(open_slots(memory, shape), memory.world, shape, num_experts, options)
    memory.synchronize()
    memory.barrier()
    return exchange


def warm_up_ids(exchange: Exchange) -> Tensor:
    """Expert ids [WARM_UP_TOKENS, top_k] for a warm-up, int32; -1 where ``exchange`` has fewer experts than top_k."""
    ids = torch.arange(exchange.top_k, dtype=torch.int32, device=exchange.slots.memory.device)
    return torch.where(ids < exchange.num_local_experts, ids, -1).expand(WARM_UP_TOKENS, -1).contiguous()


def load_kernels(memory: SymmetricMemory, launch_all: Callable[[SymmetricMemory], None]) -> None:
    """Compile and load every kernel that ``launch_all`` launches; collective.

    It is called once to say what it launches, and again if any of that is new, with memory of a world of one: loading a
    module while another kernel waits for a peer deadlocks.
    """
    if INTERPRETED:  # nothing is compiled or loaded
        return

    def on_scratch() -> None:
        scratch = LocalMemory(memory.device, timeout=60.0)
        scratch.puts, scratch.link_rate = memory.puts, memory.link_rate
        launch_all(scratch)
        scratch.synchronize()
        scratch.close()

    hosts = memory.gather(socket.gethostname())
    here = [rank for rank, host in enumerate(hosts) if host == hosts[memory.rank]]
    if compile_ahead(on_scratch, memory.device, here.index(memory.rank), len(here)):
        on_scratch()


def _new_exchange(slots: Slots, world: int, shape: SlotShape, num_experts: int, options: ExchangeOptions) -> Exchange:
    """An exchange over ``slots``, with the kernels of one over slots of that shape in a world of that size."""
    local = num_experts // world
    worst = slots.memory.world * slots.shape.max_tokens * min(shape.top_k, local)
    share = COMMUNICATION.put_share if shape.staged else COMMUNICATION.share
    programs, gemm_programs = share_multiprocessors(slots.memory.device, options.num_comm_sms, share)
    return Exchange(
        slots, local, shape.top_k,
        tile_rows=choose_tile_rows(shape.max_tokens * shape.top_k * world, num_experts, shape.dtype),
        capacity=min(worst, options.max_pairs or worst), programs=programs, gemm_programs=gemm_programs,
        keep_received=options.keep_received, presummed=options.combine == "presummed" or shape.staged, fp8=options.fp8,
        staged=shape.staged,
    )  # fmt: skip


def share_multiprocessors(
    device: torch.device, num_comm_sms: int | None, usual: float = COMMUNICATION.share
) -> tuple[int, int]:
    """Programs of communication and of GEMMs that run beside it. usual: share of communication where None is given."""
    if INTERPRETED:
        return num_comm_sms or 2, 1
    available = torch.cuda.get_device_properties(device).multi_processor_count
    share = num_comm_sms or max(round(available * usual), 1)
    if share >= available:
        raise UsageError(f"num_comm_sms is {share} and the GPU has {available}; leave some for the experts.")
    return share, available - share
