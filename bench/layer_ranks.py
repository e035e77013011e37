"""What every rank of `farskip bench layer` runs: stacks of decoder layers in each way of layer_ways.py.

A time of a layer is that of a stack less that of a short one, over the layers between: what only the first and the last
layers of a stack have, such as a last combine that nothing hides, cancels out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from farskip_fused.bench import layer_trace
from farskip_fused.bench.attention import EPSILON, Core, GroupedSizes, LatentSizes, make_attention
from farskip_fused.bench.layer_ways import (
    OVERLAPPED,
    WAYS,
    ArrivedMemory,
    ArrivedPending,
    ArrivedWholePending,
    CollectivesPending,
    MeasuredMoE,
    NoMoE,
    Way,
    WholePending,
    whole_exchange,
)
from farskip_fused.bench.nccl_ways import NCCL_WAYS, NcclPending, nccl_exchange
from farskip_fused.bench.rounds import align, in_round
from farskip_fused.bench.shapes import Routes, Shape, random_routing
from farskip_fused.connectivity import Streams
from farskip_fused.exchange_setup import ExchangeOptions
from farskip_fused.expert_parallel import Pending
from farskip_fused.layer import OverlappedLayer
from farskip_fused.symmetric import SymmetricMemory

DIRECTIONS = ("forward", "forward_backward")
SHORT = 2  # layers of the short stack
COMPARED = 3  # layers over which schedules are compared: one more than there are slots


class LayerShape(NamedTuple):
    """shared: intermediate size of the shared experts, 0 for none. normalise: of the router's top-k weights."""

    experts: Shape
    attention: LatentSizes | GroupedSizes
    shared: int
    normalise: bool


@dataclass(frozen=True)
class Case:
    """tokens: of every rank, in sequences of ``length``. sms: multiprocessors a rank that communication takes beside
    computation; None for the package's share. layers: of the stack. combine: form of the fused way's, see
    ``ExchangeOptions``. nccl: whether the ways of nccl_ways.py are measured, too, which need a GPU a rank."""

    shape: LayerShape
    tokens: int
    length: int
    sms: int | None
    layers: int
    combine: str = "direct"
    nccl: bool = False


@dataclass(frozen=True)
class Measured:
    """times: by direction, way and number of layers, ms in each iteration.
    sent: bytes of a layer's forward pass that leave this rank, by way; backward sends as many again.
    differences: of each way from the plain definition of its connectivity, see ``Stack.compare``.
    """

    times: dict[str, dict[str, dict[int, list[float]]]]
    sent: dict[str, int]
    differences: dict[str, dict[str, float]]
    attention: str
    comm_sms: int
    gemm_sms: int


def measure(
    memory: SymmetricMemory, case: Case, link_rate: int | None, iterations: int, trace: str | None = None
) -> Measured:
    """link_rate: bytes a microsecond of this rank's link to others, None for as fast as stores go.
    trace: file to which rank 0 writes a profile."""
    memory.link_rate = link_rate
    stack = Stack(memory, case)
    stack.load()
    memory.synchronize()
    memory.barrier()
    compared = ("blocking", *OVERLAPPED, *(NCCL_WAYS if case.nccl else ()))
    differences = {name: stack.compare(name) for name in compared}
    times = {direction: stack.time(direction, iterations) for direction in DIRECTIONS}
    memory.synchronize()
    if trace is not None:
        layer_trace.profile(stack, trace)
    exchange = stack.moes[0].exchange
    return Measured(
        times, stack.sent(), differences, stack.core.name, exchange.programs, exchange.gemm_programs
    )  # fmt: skip


class SharedExperts(nn.Module):
    def __init__(self, hidden: int, intermediate: int, **options: Any) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=False, **options)
        self.down = nn.Linear(intermediate, hidden, bias=False, **options)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden_states).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


class Stack:
    """Decoder layers of one rank, their weights shared by all ways, and the inputs that all ways are given."""

    def __init__(self, memory: SymmetricMemory, case: Case) -> None:
        self.memory, self.case, shape = memory, case, case.shape.experts
        torch.manual_seed(1 + memory.rank)
        dtype = torch.bfloat16 if memory.device.type == "cuda" else torch.float32
        self.options: dict[str, Any] = {"device": memory.device, "dtype": dtype}
        self.stream = torch.cuda.Stream(memory.device) if memory.device.type == "cuda" else None
        with self.on_stream():
            self.embedding, self.gradient = torch.randn(2, case.tokens, shape.hidden, **self.options)
            self.ids, self.weights = random_routing(shape, case.tokens, memory.device)
            all_ids, all_weights = (torch.stack(memory.gather(each.cpu())) for each in (self.ids, self.weights))
            self.owners = all_ids // (shape.experts // memory.world)  # [rank, T, K], of each token's experts
            self.moes: list[MeasuredMoE] = []
            self.layers: dict[str, list[OverlappedLayer]] = {"farskip": [], "standard": [], "window": []}
            for _ in range(case.layers):
                self._add_layer()
            self.moes[0].setup()
            for moe in self.moes:
                moe.share_setup(self.moes[0])
                moe.use_routing(self.ids)
            self.ways = self._make_ways(all_ids, all_weights)
        memory.synchronize()

    def _add_layer(self) -> None:
        memory, case, (shape, sizes, shared, normalise) = self.memory, self.case, self.case.shape
        # Room for the pairs that come, not for all that could: ranks of one GPU share its memory.
        pairs = max(int((self.owners == rank).sum()) for rank in range(memory.world))
        moe = MeasuredMoE(
            *shape, ep=memory, max_tokens=case.tokens, dtype=self.options["dtype"],
            exchange=ExchangeOptions(num_comm_sms=case.sms, max_pairs=pairs, combine=case.combine),
            normalize_top_k=normalise,
        )  # fmt: skip
        with torch.no_grad():
            for weight in (moe.w13, moe.w2, moe.gate.weight):
                weight.normal_(std=weight.shape[-1] ** -0.5)
        attention = make_attention(shape.hidden, sizes, case.length, **self.options)
        if not self.moes:
            with torch.no_grad():
                self.core = Core(*attention.project(self.embedding))
        attention.core = self.core
        norms = {name: nn.RMSNorm(shape.hidden, eps=EPSILON, **self.options) for name in ("attention_norm", "moe_norm")}
        shared_experts = SharedExperts(shape.hidden, shared, **self.options) if shared else None
        for name, layers in self.layers.items():
            layers.append(
                OverlappedLayer(
                    attention, cast(MeasuredMoE, NoMoE(moe.slot_shape)) if name == "window" else moe, **norms,
                    shared_experts=shared_experts, connectivity="standard" if name == "standard" else "farskip",
                )
            )  # fmt: skip
        self.moes.append(moe)

    def _make_ways(self, all_ids: Tensor, all_weights: Tensor) -> dict[str, Way]:
        exchange = self.moes[0].exchange
        shape = replace(exchange.slots.shape, staged=False)
        self.arrived = ArrivedMemory(self.memory)
        slots = self.arrived.fill(shape, all_ids, all_weights)
        arrived = replace(exchange, slots=slots, presummed=False)
        shape_of_values = (exchange.capacity, shape.hidden_size)
        self.values = torch.randn(shape_of_values, **self.options)
        blocking, streams = (whole_exchange(exchange, blocking=each) for each in (True, False))
        ways = {
            "blocking": Way("standard", blocking, WholePending),
            "paper": Way("farskip", streams, WholePending),
            "fused": Way("farskip", exchange, Pending),
            "computation": Way("farskip", arrived, ArrivedPending),
            "computation_all": Way("standard", whole_exchange(arrived, blocking=True), ArrivedWholePending),
            "collectives": Way("farskip", streams, CollectivesPending),
            "window": Way("window", exchange, Pending),
        }
        assert tuple(ways) == WAYS
        if self.case.nccl:
            on_gpu = self.memory.device.type == "cuda"
            group = dist.new_group(backend="nccl") if on_gpu else dist.group.WORLD
            routes = Routes.of(all_ids, self.memory.rank, exchange.num_local_experts).to(self.memory.device)
            for name, connectivity, whole in zip(NCCL_WAYS, ("standard", "farskip"), (blocking, streams), strict=True):
                ways[name] = Way(connectivity, nccl_exchange(whole, routes, group), NcclPending)
        return ways

    def on_stream(self) -> Any:
        """Autograd runs backward on the stream of forward: the one on which it is captured."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def load(self) -> None:
        """Launch everything once without a peer: no kernel is loaded while another waits for one. NCCL's ways need
        their peers, and come last."""
        with self.on_stream():
            for name in ("computation", "computation_all", "window", *(NCCL_WAYS if self.case.nccl else ())):
                for direction in DIRECTIONS:
                    self.run(name, direction, SHORT)
        self.arrived.synchronize()

    def run(self, name: str, direction: str, layers: int) -> tuple[Tensor, ...]:
        """One pass of so many layers: the result and, with backward, gradients of the embedding and the weights."""
        way = self.ways[name]
        with_backward = direction == "forward_backward"
        with torch.set_grad_enabled(with_backward):
            embedding = self.embedding.detach().requires_grad_(with_backward)
            if name == "collectives":
                result, weights = self._collect(way, layers, embedding), []
            else:
                for moe in self.moes:
                    moe.way = way
                carry: Any = embedding
                for layer in self.layers[way.connectivity][:layers]:
                    carry = layer(carry)
                result, weights = carry.full(), self._weights(way.connectivity, layers)
            if not with_backward:
                return (result,)
            return result.detach(), *torch.autograd.grad(result, [embedding, *weights], self.gradient)

    def _weights(self, name: str, layers: int) -> list[nn.Parameter]:
        return list(nn.ModuleList(self.layers[name][:layers]).parameters())

    def _collect(self, way: Way, layers: int, rows: Tensor) -> Tensor:
        """Dispatch and combine of so many layers, each after the one before."""
        for _ in range(layers):
            pending = way.pending(way.exchange, rows, self.ids, self.weights, self.values, self.values)
            rows = pending.finish()
        return rows

    def compare(self, name: str) -> dict[str, float]:
        """Relative difference of a way's result or gradients, whichever is larger, from the plain definition of its
        connectivity: schedule, with the same rounds one after the other, over a few layers; rounds, over one layer with
        those of another way. (Over several layers bfloat16 amplifies what rounds round differently.)"""
        other = "paper" if name == "fused" else "fused"
        return {
            "schedule": self.difference(name, name, min(COMPARED, self.case.layers)),
            "rounds": self.difference(name, other, 1),
        }

    def difference(self, name: str, rounds: str, layers: int) -> float:
        """Of a way from the plain definition with the rounds of ``rounds``."""
        connectivity = self.ways[name].connectivity
        with self.on_stream():
            result, *gradients = self.run(name, "forward_backward", layers)
            self.memory.synchronize()
            for moe in self.moes:
                moe.way = self.ways[rounds]
            with torch.enable_grad():
                embedding = self.embedding.detach().requires_grad_()
                streams = Streams.before_layers(embedding)
                for layer in self.layers[connectivity][:layers]:
                    streams = layer.reference(streams)
                expected = streams.full
                inputs = [embedding, *self._weights(connectivity, layers)]
                expected_gradients = torch.autograd.grad(expected, inputs, self.gradient)
            self.memory.synchronize()
        off = relative_difference([result - self.embedding], [expected.detach() - self.embedding])
        # What is no number counts as largest.
        return float(torch.tensor([off, relative_difference(gradients, expected_gradients)]).max())

    def time(self, direction: str, iterations: int) -> dict[str, dict[int, list[float]]]:
        """ms of every way and number of layers in each iteration, which all ranks begin together; every iteration in
        another order, the same at all ranks: replays of CUDA graphs between events, on CPU calls by the clock."""
        calls: dict[Any, Callable[[], Any]]
        calls = {
            (name, layers): partial(self.run, name, direction, layers) for name in self.ways for layers in self.sizes
        }
        times: dict[str, dict[int, list[float]]] = {name: {layers: [] for layers in self.sizes} for name in self.ways}
        orders = [list(calls) for _ in range(iterations)]
        shuffle = random.Random(0).shuffle
        for order in orders:
            shuffle(order)
        timed = self._time_calls if self.stream is None else self._time_graphs
        for (name, layers), ms in timed(calls, orders):
            times[name][layers].append(ms)
        return times

    @property
    def sizes(self) -> tuple[int, int]:
        return SHORT, self.case.layers

    def _time_calls(self, calls: dict[Any, Callable[[], Any]], orders: Sequence[list[Any]]) -> Iterator[Any]:
        for order in orders:
            for key in order:
                self.memory.barrier()
                start = time.perf_counter()
                calls[key]()
                yield key, (time.perf_counter() - start) * 1e3

    def _time_graphs(self, calls: dict[Any, Callable[[], Any]], orders: Sequence[list[Any]]) -> Iterator[Any]:
        graphs, pool = {}, torch.cuda.graph_pool_handle()  # nothing that a pass leaves is used: they share memory
        for key, call in {None: self.align, **calls}.items():
            self.memory.synchronize()
            self.memory.barrier()
            graphs[key] = torch.cuda.CUDAGraph()
            # Threads of NCCL's go on asking for their events meanwhile.
            with torch.cuda.graph(graphs[key], pool=pool, stream=self.stream, capture_error_mode="thread_local"):
                call()
        self.memory.synchronize()
        self.memory.barrier()
        found = []
        for order in orders:
            for key in order:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                graphs[None].replay()
                start.record()
                graphs[key].replay()
                end.record()
                found.append((key, start, end))
        self.memory.synchronize()
        for key, start, end in found:
            yield key, start.elapsed_time(end)

    def align(self) -> None:
        """No rank goes on before all are here."""
        in_round(self.moes[0].exchange, align)

    def sent(self) -> dict[str, int]:
        """Bytes of a layer's forward pass that leave this rank, by overlapped way: rows to the ranks of their experts,
        and what the experts here made for the tokens of others."""
        rank, shape = self.memory.rank, self.case.shape.experts
        others = [other for other in range(self.memory.world) if other != rank]
        row = shape.hidden * self.embedding.itemsize
        dispatched = sum(int((self.owners[rank] == other).any(1).sum()) for other in others)
        made = self.owners[others] == rank
        sums, rows = int(made.any(2).sum()), int(made.sum())
        fused = sums if self.moes[0].exchange.presummed else rows
        return {"paper": (dispatched + sums) * row, "fused": (dispatched + fused) * row}


def relative_difference(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of all tensors together."""
    error = sum(float((one.float() - other.float()).norm()) ** 2 for one, other in zip(values, expected, strict=True))
    return (error / sum(float(other.float().norm()) ** 2 for other in expected)) ** 0.5
