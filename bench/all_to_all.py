"""Other all-to-alls where every rank has a GPU of its own: torch's over NCCL, torch's over NVSHMEM, and DeepEP's.

They move what ours moves when routing is known beforehand: one row a token and rank that wants it, the own rank
included, and one row each on the way back, summed at the owner. Each runs in processes of its own, after ours: two
NVSHMEMs in one process may clash, and none that fails or hangs takes a measurement with it.
"""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from farskip_fused.bench.collectives import Refused, capture, run_others, synchronize, time_call, together
from farskip_fused.bench.comm_ranks import Case, Measured
from farskip_fused.bench.shapes import Routes, random_routing

NCCL = "torch's all_to_all_single over NCCL"
SYMMETRIC = "torch's symmetric-memory all-to-all"
DEEPEP = "DeepEP"
STEPS = ("dispatch", "combine of sums")
SHARED = "it is not timed here: NCCL, and what is built on it, refuses two ranks on one GPU"
DEEPEP_SHARED = "it is timed with a GPU a rank only; the table has its marks of an earlier run"
DEEPEP_MISSING = "it is not installed; the table has its marks of an earlier run"
DEEPEP_BYTES = 10**9  # of its buffer, as its own tests have it


class Found(NamedTuple):
    """One case of one peer: measured by every rank, by replays of a CUDA graph or, if not ``captured``, eagerly."""

    peer: str
    name: str
    case: Case
    measured: list[Measured]
    captured: bool


def compare(cases: Sequence[tuple[str, Case]], world: int, iterations: int) -> tuple[list[Found], dict[str, str]]:
    """Time the peers on named cases, each rank with a GPU; returns what was found, and why what is missing is.

    Only DeepEP takes as many multiprocessors as it is told; the others choose, and their cases have sms 0.
    """
    found, missing = [], {}
    as_they_like = list(dict.fromkeys((name, replace(case, sms=0)) for name, case in cases))
    for peer in PEERS:
        taken = list(cases) if peer == DEEPEP else as_they_like
        if peer == DEEPEP and importlib.util.find_spec("deep_ep") is None:
            missing[peer] = DEEPEP_MISSING
            continue
        outcomes = run_others(measure, world, peer, [case for _, case in taken], iterations)
        if isinstance(outcomes, str):
            missing[peer] = outcomes
            continue
        for (name, case), *measured in zip(taken, *outcomes, strict=True):
            captured = all(is_captured for _, is_captured in measured)
            found.append(Found(peer, name, case, [times for times, _ in measured], captured))
    return found, missing


def missing_on_shared_gpu() -> dict[str, str]:
    """Why none of them is timed between ranks of one GPU."""
    is_there = importlib.util.find_spec("deep_ep") is not None
    return {NCCL: SHARED, SYMMETRIC: SHARED, DEEPEP: DEEPEP_SHARED if is_there else DEEPEP_MISSING}


def measure(device: torch.device, peer: str, cases: list[Case], iterations: int) -> list[tuple[Measured, bool]] | str:
    """On each rank: times of every case and whether they are of graphs, or on all ranks why there are none."""
    try:
        group = together(lambda: dist.new_group(backend="nccl") if device.type == "cuda" else dist.group.WORLD)
        return [_measure(device, PEERS[peer], group, case, iterations) for case in cases]
    except Refused as refused:
        return str(refused)


def _measure(device: torch.device, kind: type[Peer], group: Any, case: Case, iterations: int) -> tuple[Measured, bool]:
    traffic = Traffic.random(case, device)
    aligned = torch.zeros(1, device=device)

    def align() -> None:
        dist.all_reduce(aligned, group=group)

    peer = together(lambda: kind(traffic, group, case))
    outputs: dict[str, Tensor] = {}

    def dispatch() -> None:
        outputs["dispatch"] = peer.dispatch()

    def combine() -> None:
        outputs["combine"] = peer.combine()

    calls = [align, dispatch, combine]

    def warm_up() -> None:
        for call in calls * 2:
            call()
        synchronize(device)

    together(warm_up)
    calls, captured = capture(calls, device)
    together(lambda: _check(traffic, peer, calls, outputs))
    times = {}
    for step, call in zip(STEPS, calls[1:], strict=True):
        times[step] = time_call(calls[0], call, iterations, device, captured)
        dist.barrier()
    return Measured(times, sum(traffic.routes.received)), captured


class Traffic(NamedTuple):
    """Rows [T, H] of this rank, their expert ids [T, K] and where they go; the same rows and routing as ours have."""

    rows: Tensor
    ids: Tensor
    routes: Routes

    @staticmethod
    def random(case: Case, device: torch.device) -> Traffic:
        rank, world = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(1 + rank)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        rows = torch.randn(case.tokens, case.shape.hidden, device=device).to(dtype)
        ids, _ = random_routing(case.shape, case.tokens, device)
        of_all: list[Any] = [None] * world
        dist.all_gather_object(of_all, ids.cpu())
        return Traffic(rows, ids, Routes.of(torch.stack(of_all), rank, case.shape.experts // world).to(device))


class Peer(ABC):
    """values: received rows as ``combine`` sends them back, [rows, H] or longer."""

    values: Tensor

    @abstractmethod
    def __init__(self, traffic: Traffic, group: Any, case: Case) -> None: ...

    @abstractmethod
    def dispatch(self) -> Tensor:
        """Rows that this rank receives, [rows, H], by sender and then by token."""

    @abstractmethod
    def combine(self) -> Tensor:
        """[T, H], the sum of what all ranks send back."""


class Collective(Peer):
    """all_to_all_single with sizes that the host knows; rows are gathered before it and summed after it."""

    def __init__(self, traffic: Traffic, group: Any, case: Case) -> None:
        self.rows, self.routes, self.group = traffic.rows, traffic.routes, group
        self.to_send, self.values, self.returned = (
            traffic.rows.new_empty(count, case.shape.hidden)
            for count in (len(self.routes.order), sum(self.routes.received), len(self.routes.order) + 1)
        )

    def dispatch(self) -> Tensor:
        routes = self.routes
        torch.index_select(self.rows, 0, routes.order, out=self.to_send)
        dist.all_to_all_single(self.values, self.to_send, routes.received, routes.sent, group=self.group)
        return self.values

    def combine(self) -> Tensor:
        routes = self.routes
        dist.all_to_all_single(self.returned[:-1], self.values, routes.sent, routes.received, group=self.group)
        return routes.sum_at_owner(self.returned)


class Symmetric(Peer):
    """all_to_all_vdev over torch's symmetric memory with NVSHMEM, sizes in device memory; the experts' results are
    taken to lie in symmetric memory already.
    """

    kept: ClassVar[list[Tensor]] = []  # never freed, which would be collective

    def __init__(self, traffic: Traffic, group: Any, case: Case) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        # As our own symmetric memory: no network card inside a node, and no multicast.
        os.environ.setdefault("NVSHMEM_REMOTE_TRANSPORT", "none")
        os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")
        if not hasattr(symmetric, "is_nvshmem_available") or not symmetric.is_nvshmem_available():
            raise RuntimeError("this torch has no NVSHMEM")
        if not hasattr(torch.ops.symm_mem, "all_to_all_vdev"):
            raise RuntimeError("this torch has no all_to_all_vdev")
        self.call = torch.ops.symm_mem.all_to_all_vdev
        if len(self.call.default._schema.arguments) != 5:
            raise RuntimeError(f"all_to_all_vdev of this torch takes other arguments: {self.call.default._schema}")
        if symmetric.get_backend(traffic.rows.device) != "NVSHMEM":
            symmetric.set_backend("NVSHMEM")
        world, hidden = dist.get_world_size(), case.shape.hidden
        # A power of two: the kernel wants rows that divide evenly over as many blocks as it derives from this size.
        rows = 1 << (world * case.tokens - 1).bit_length()

        def allocate(*size: int, dtype: torch.dtype = traffic.rows.dtype) -> Tensor:
            tensor = symmetric.empty(*size, dtype=dtype, device=traffic.rows.device).zero_()
            self.kept.append(tensor)
            return tensor

        self.traffic, self.name = traffic, dist.group.WORLD.group_name  # type: ignore[union-attr]
        self.to_send, self.values = allocate(rows, hidden), allocate(rows, hidden)
        self.returned = allocate(rows + 1, hidden)
        self.sent, self.received = allocate(world, dtype=torch.int64), allocate(world, dtype=torch.int64)
        self.arrived, self.came_back = allocate(2, world, dtype=torch.int64), allocate(2, world, dtype=torch.int64)
        self.sent.copy_(torch.tensor(traffic.routes.sent))
        self.received.copy_(torch.tensor(traffic.routes.received))
        for tensor in self.kept[-7:]:
            symmetric.rendezvous(tensor, self.name)
        torch.cuda.synchronize()
        dist.barrier()

    def dispatch(self) -> Tensor:
        rows, _, routes = self.traffic
        torch.index_select(rows, 0, routes.order, out=self.to_send[: len(routes.order)])
        self.call(self.to_send, self.values, self.sent, self.arrived, self.name)
        return self.values[: sum(routes.received)]

    def combine(self) -> Tensor:
        self.call(self.values, self.returned, self.received, self.came_back, self.name)
        return self.traffic.routes.sum_at_owner(self.returned)


class DeepEp(Peer):
    """Its kernels inside a node, with the layout of an earlier dispatch."""

    buffer: Any = None

    def __init__(self, traffic: Traffic, group: Any, case: Case) -> None:
        import deep_ep  # type: ignore[import-not-found]

        deep_ep.Buffer.set_num_sms(case.sms)
        if DeepEp.buffer is None:
            DeepEp.buffer = deep_ep.Buffer(group, DEEPEP_BYTES, 0)
        self.traffic = traffic
        per_rank, _, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(traffic.ids.long(), case.shape.experts)
        received, _, _, _, self.handle, _ = self.buffer.dispatch(
            traffic.rows, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert
        )
        self.values = received.clone()

    def dispatch(self) -> Tensor:
        return self.buffer.dispatch(self.traffic.rows, handle=self.handle)[0]

    def combine(self) -> Tensor:
        return self.buffer.combine(self.values, self.handle)[0]


PEERS: dict[str, type[Peer]] = {NCCL: Collective, SYMMETRIC: Symmetric, DEEPEP: DeepEp}


def _check(traffic: Traffic, peer: Peer, calls: list[Callable[[], None]], outputs: dict[str, Tensor]) -> None:
    """New rows, sent and returned as they came, are each multiplied by the number of ranks that wanted them."""
    align, dispatch, combine = calls
    traffic.rows.normal_()
    align()
    dispatch()
    received = outputs["dispatch"]
    peer.values[: len(received)].copy_(received)
    align()
    combine()
    copies = (traffic.routes.places < len(traffic.routes.order)).sum(1, keepdim=True)
    torch.testing.assert_close(
        outputs["combine"].float(), traffic.rows.float() * copies, rtol=2e-2, atol=1e-2,
        msg=lambda message: f"it does not bring back what was sent: {' '.join(message.split())}",
    )  # fmt: skip
