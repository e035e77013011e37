"""What every rank of `farskip bench fused` runs: communication and GEMMs of the expert layer, apart and as one.

Each part is taken in four ways:
comm     what travels, alone, on the multiprocessors that the layer gives communication. Where GEMMs store at the owners
         of the tokens there is no kernel to time alone: ``Measured.link_ms`` has what a link takes for those bytes, and
         comm the sum of results that are there.
gemm     the products alone, on the multiprocessors that the layer leaves them, on rows that are there.
unfused  one after the other, each kernel on all multiprocessors of the rank; results travel summed, as they would
         where a GEMM cannot store at their owners.
fused    as the layer launches them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farskip_fused.bench.rounds import align, dispatch_with_routing, in_round, time_launches
from farskip_fused.bench.shapes import Shape, random_routing
from farskip_fused.exchange_setup import ExchangeOptions, set_up, warm_up_ids
from farskip_fused.expert_parallel import Pending
from farskip_fused.flight import Exchange
from farskip_fused.kernels import combine, dispatch, experts, experts_backward
from farskip_fused.kernels.dispatch import Received, SendOrder
from farskip_fused.kernels.experts_to_owner import project_to_owner
from farskip_fused.kernels.layout import Layout
from farskip_fused.kernels.protocol import Round, SlotRows
from farskip_fused.symmetric import SymmetricMemory
from farskip_fused.symmetric.interface import join
from farskip_fused.symmetric.slots import SlotShape

PARTS = ("dispatch + up", "down + combine", "layer forward", "layer backward")
WAYS = ("comm", "gemm", "unfused", "fused")
LAYERS = PARTS[2:]


@dataclass(frozen=True)
class Case:
    """tokens: of every rank. sms: multiprocessors a rank that communication takes; None for the package's share."""

    shape: Shape
    tokens: int
    sms: int | None


@dataclass(frozen=True)
class Measured:
    """By part: times, ms of each way in each iteration; received, bytes from other ranks, fused; link_ms, of what GEMMs
    store at other ranks, None without a named link; differences, of the fused results from the unfused ones, relative,
    of whole layers. comm_sms, gemm_sms: multiprocessors of this rank.
    """

    times: dict[str, dict[str, list[float]]]
    received: dict[str, int]
    link_ms: dict[str, float | None]
    differences: dict[str, float]
    comm_sms: int
    gemm_sms: int


class Inputs(NamedTuple):
    """Of one rank: rows and gradient [T, H], ids and weights [T, K], its experts' w13 and w2."""

    rows: Tensor
    ids: Tensor
    weights: Tensor
    gradient: Tensor
    w13: Tensor
    w2: Tensor

    def few(self, exchange: Exchange) -> Inputs:
        """For a warm-up on a world of one."""
        ids = warm_up_ids(exchange)
        rows, weights, gradient = (
            each.new_ones(len(ids), each.shape[1]) for each in (self.rows, self.weights, self.gradient)
        )
        return self._replace(rows=rows, ids=ids, weights=weights, gradient=gradient)


def measure(memory: SymmetricMemory, cases: list[Case], link_rate: int | None, iterations: int) -> list[Measured]:
    """Every case on this rank, none before in this process: slots keep the rate that they were made for.

    link_rate: bytes a microsecond of this rank's link to others, None for as fast as stores go.
    """
    memory.link_rate = link_rate
    return [_measure(memory, case, iterations) for case in cases]


def _measure(memory: SymmetricMemory, case: Case, iterations: int) -> Measured:
    shape, device = case.shape, memory.device
    torch.manual_seed(1 + memory.rank)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    local = shape.experts // memory.world

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device).to(dtype)

    rows, gradient = normal(case.tokens, shape.hidden), normal(case.tokens, shape.hidden)
    ids, weights = random_routing(shape, case.tokens, device)
    w13 = normal(local, 2 * shape.intermediate, shape.hidden) / shape.hidden**0.5
    w2 = normal(local, shape.hidden, shape.intermediate) / shape.intermediate**0.5
    inputs = Inputs(rows, ids, weights, gradient, w13, w2)
    owners = torch.stack([each // local for each in memory.gather(ids.cpu())])  # of each expert that a token wants
    # Room for the pairs that come, not for all that could: ranks of one GPU share its memory.
    pairs = max(int((owners == rank).sum()) for rank in range(memory.world))
    options = ExchangeOptions(num_comm_sms=case.sms, max_pairs=pairs)
    slots = SlotShape(case.tokens, shape.hidden, shape.top_k, dtype)
    # Every launch once on a world of one: no kernel is loaded while another waits for a peer.
    exchange = set_up(memory, slots, shape.experts, options, lambda small: _Layer(small, inputs.few(small)).run_all())
    layer = _Layer(exchange, inputs)
    differences = layer.compare()
    memory.synchronize()
    times = {part: {way: layer.time(part, way, iterations) for way in WAYS} for part in PARTS}
    memory.synchronize()

    others = [rank for rank in range(memory.world) if rank != memory.rank]
    row = shape.hidden * dtype.itemsize
    dispatched = int((owners[others] == memory.rank).any(2).sum()) * row
    returned = int((owners[memory.rank] != memory.rank).sum()) * row
    stored = int((owners[others] == memory.rank).sum()) * row
    link_ms = None if memory.link_rate is None else stored / memory.link_rate * 1e-3
    return Measured(
        times,
        received=dict(zip(PARTS, (dispatched, returned, dispatched + returned, dispatched + returned), strict=True)),
        link_ms=dict(zip(PARTS, (None, link_ms, link_ms, link_ms), strict=True)),
        differences=differences, comm_sms=exchange.programs, gemm_sms=exchange.gemm_programs,
    )  # fmt: skip


class _Layer:
    """The parts on one rank's rows, routing and experts, and what an earlier pass leaves for each of them."""

    order: SendOrder
    received: Received
    where: Layout
    turns: Tensor
    kept: Tensor
    gate_up: Tensor | None
    activated: Tensor
    weight_parts: Tensor

    def __init__(self, exchange: Exchange, inputs: Inputs) -> None:
        self.exchange, self.inputs = exchange, inputs
        self.local, self.top_k = exchange.num_local_experts, exchange.top_k
        shape, memory = exchange.slots.shape, exchange.slots.memory
        self.hidden, self.dtype = shape.hidden_size, shape.dtype
        # Of the rank: what runs beside nothing takes all of them.
        self.all_programs = exchange.all_programs
        for _ in range(shape.depth):  # every slot then holds rows that a GEMM can read
            in_round(exchange, self._prepare)
        # Autograd runs backward on the stream of forward: the one on which backward is captured later.
        self.stream = torch.cuda.Stream(memory.device) if memory.device.type == "cuda" else None
        memory.synchronize()
        with self._on_stream():
            self.leaves = [each.detach().clone().requires_grad_() for each in (inputs.rows, inputs.weights)]
            self.leaves += [each.detach().requires_grad_() for each in (inputs.w13, inputs.w2)]
            hidden_states, weights, w13, w2 = self.leaves
            self.result = Pending(exchange, hidden_states, inputs.ids, weights, w13, w2).finish()
        memory.synchronize()

    def _on_stream(self) -> Any:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _prepare(self, round_: Round) -> None:
        """A whole dispatch, and what forward leaves for backward."""
        exchange, inputs = self.exchange, self.inputs
        programs, rows = exchange.gemm_programs, exchange.slots.rows
        self.order, self.received, self.where = dispatch_with_routing(
            exchange, round_, inputs.rows, inputs.ids, inputs.weights
        )
        self.turns = combine.find_turns(round_, self.received.experts, self.local)
        self.kept = inputs.rows.new_empty(round_.world * exchange.slots.shape.max_tokens, self.hidden)
        dispatch.keep_rows(round_, self.received.experts, self.kept)
        self.gate_up, self.activated = experts.up_swiglu(
            rows, self.where, self.top_k, inputs.w13, True, slot=SlotRows(round_), programs=programs
        )
        _, _, self.weight_parts = self._down_gradient(round_, programs)

    def run_all(self) -> None:
        with self._on_stream():
            in_round(self.exchange, align)
            for part in PARTS:
                for way in WAYS:
                    self.launch(part, way)()

    def time(self, part: str, way: str, iterations: int) -> list[float]:
        return time_launches(self.exchange, self.launch(part, way), iterations, self.stream)

    def compare(self) -> dict[str, float]:
        """Relative difference of the fused results from the unfused ones, the largest of each layer's."""
        differences = {}
        for part in LAYERS:
            pairs = []
            for way in ("fused", "unfused"):
                with self._on_stream():
                    pairs.append(self.launch(part, way)())
                self.exchange.slots.memory.synchronize()
            fused, unfused = pairs
            errors = [
                float((one.float() - other.float()).norm() / other.float().norm())
                for one, other in zip(fused, unfused, strict=True)
            ]
            differences[part] = float(torch.tensor(errors).max())  # what is no number counts as largest
        return differences

    def launch(self, part: str, way: str) -> Callable[[], Any]:
        """Everything of one iteration, its rounds included."""
        if way == "fused" and part in LAYERS:
            return self._forward if part == "layer forward" else self._backward
        steps: dict[tuple[str, str], Callable[[Round], Any]] = {
            ("dispatch + up", "comm"): self._dispatch,
            ("dispatch + up", "gemm"): self._up,
            ("dispatch + up", "unfused"): self._dispatch_then_up,
            ("dispatch + up", "fused"): self._up_while_rows_arrive,
            ("down + combine", "comm"): self._sum,
            ("down + combine", "gemm"): self._down,
            ("down + combine", "unfused"): self._down_then_combine,
            ("down + combine", "fused"): self._down_to_owners,
            ("layer forward", "comm"): self._forward_comm,
            ("layer forward", "gemm"): self._forward_gemms,
            ("layer forward", "unfused"): self._forward_unfused,
            ("layer backward", "comm"): self._backward_comm,
            ("layer backward", "gemm"): self._backward_gemms,
            ("layer backward", "unfused"): self._backward_unfused,
        }
        return partial(in_round, self.exchange, steps[part, way])

    # Dispatch + up

    def _send(self, round_: Round, rows: Tensor) -> None:
        dispatch.wait_to_send(round_)
        dispatch.send_rows(round_, rows, self.order, self.local)

    def _dispatch(self, round_: Round) -> None:
        self._send(round_, self.inputs.rows)
        dispatch.wait_rows(round_)

    def _up(self, round_: Round, programs: int | None = None, arrived: bool = True) -> None:
        experts.up_swiglu(
            self.exchange.slots.rows, self.where, self.top_k, self.inputs.w13, False,
            slot=SlotRows(round_, arrived=arrived), programs=programs or self.exchange.gemm_programs,
        )  # fmt: skip

    def _dispatch_then_up(self, round_: Round) -> None:
        self._dispatch(self._on_all(round_))
        self._up(round_, self.all_programs)

    def _up_while_rows_arrive(self, round_: Round) -> None:
        """As in expert_parallel, without the routing."""
        with self.exchange.beside():
            self._send(round_, self.inputs.rows)
        mark = self.exchange.mark()
        self._up(round_, arrived=False)
        join(mark)
        dispatch.wait_rows(round_)

    # Down + combine

    def _sum(self, round_: Round) -> None:
        combine.announce_sent(round_)
        self._combine_wait(round_, self.inputs.weights)

    def _combine_wait(self, round_: Round, weights: Tensor | None, presummed: bool = False) -> Tensor:
        result, _ = combine.combine_wait(
            round_, self.inputs.ids, weights, self.hidden, self.dtype, self.local if presummed else 0
        )
        return result

    def _down(self, round_: Round) -> None:
        experts.project(self.activated, self.where, self.inputs.w2, 1, programs=self.all_programs)

    def _down_then_combine(self, round_: Round) -> None:
        self._push_sums(round_, self.activated, self.inputs.w2, 1, self.received.weights)
        combine.announce_sent(round_)
        self._combine_wait(round_, None, presummed=True)

    def _push_sums(
        self, round_: Round, values: Tensor, weight: Tensor, column_dim: int, weights: Tensor | None
    ) -> None:
        """A projection, and then its rows, summed, to the owners of the tokens."""
        values = experts.project(values, self.where, weight, column_dim, programs=self.all_programs)
        combine.wait_to_send(round_)
        combine.push_sums(self._on_all(round_), values, self.where.places, weights, self.turns, self.top_k)

    def _down_to_owners(self, round_: Round) -> None:
        combine.wait_to_send(round_)
        project_to_owner(round_, self.activated, self.where, self.top_k, self.inputs.w2, 1, self.all_programs)
        combine.announce_sent(round_)
        self._combine_wait(round_, self.inputs.weights)

    # Layer forward

    def _route_and_dispatch(self, round_: Round) -> tuple[SendOrder, Received, Layout]:
        return dispatch_with_routing(self.exchange, round_, *self.inputs[:3])

    def _forward_comm(self, round_: Round) -> None:
        self._route_and_dispatch(round_)
        self._sum(round_)

    def _forward_gemms(self, round_: Round) -> None:
        self._up(round_)
        self._down(round_)

    def _forward_unfused(self, round_: Round) -> tuple[Tensor]:
        everywhere = self._on_all(round_)
        _, received, where = self._route_and_dispatch(everywhere)
        _, activated = experts.up_swiglu(
            self.exchange.slots.rows, where, self.top_k, self.inputs.w13, False,
            slot=SlotRows(round_, arrived=True), programs=self.all_programs,
        )  # fmt: skip
        turns = combine.find_turns(round_, received.experts, self.local)
        values = experts.project(activated, where, self.inputs.w2, 1, programs=self.all_programs)
        combine.wait_to_send(round_)
        combine.push_sums(everywhere, values, where.places, received.weights, turns, self.top_k)
        combine.announce_sent(round_)
        return (self._combine_wait(round_, None, presummed=True),)

    def _forward(self) -> tuple[Tensor]:
        pending = Pending(self.exchange, *self.inputs[:3], self.inputs.w13, self.inputs.w2)
        pending.experts()
        return (pending.finish(),)

    # Layer backward

    def _backward_comm(self, round_: Round) -> None:
        self._send(round_, self.inputs.gradient)
        dispatch.wait_rows(round_)
        combine.wait_to_send(round_)
        combine.push_weight_gradients(round_, self.weight_parts, self.where.places)
        combine.announce_sent(round_)
        self._combine_wait(round_, None)
        combine.take_weight_gradients(round_, self.inputs.ids)

    def _down_gradient(self, round_: Round, programs: int) -> tuple[Tensor, Tensor, Tensor]:
        assert self.gate_up is not None
        return experts_backward.down_gradient_swiglu(
            self.exchange.slots.rows, self.received.weights, self.where, self.inputs.w2, self.gate_up,
            slot=SlotRows(round_, arrived=True), programs=programs,
        )  # fmt: skip

    def _weight_gradients(
        self, round_: Round, gate_up_gradient: Tensor, activation: Tensor, programs: int
    ) -> tuple[Tensor, Tensor]:
        slot, where, top_k = SlotRows(round_, arrived=True), self.where, self.top_k
        weight_gradient, rows = experts_backward.weight_gradient, self.exchange.slots.rows
        return (
            weight_gradient(gate_up_gradient, self.kept, where, top_k, False, programs=programs),
            weight_gradient(rows, activation, where, top_k, True, slot=slot, programs=programs),
        )

    def _backward_gemms(self, round_: Round) -> None:
        gate_up_gradient, activation, _ = self._down_gradient(round_, self.exchange.gemm_programs)
        programs = self.all_programs
        experts.project(gate_up_gradient, self.where, self.inputs.w13, 2, programs=programs)
        self._weight_gradients(round_, gate_up_gradient, activation, programs)

    def _backward_unfused(self, round_: Round) -> tuple[Tensor, ...]:
        self._send(self._on_all(round_), self.inputs.gradient)
        dispatch.wait_rows(round_)
        gate_up_gradient, activation, parts = self._down_gradient(round_, self.all_programs)
        self._push_sums(round_, gate_up_gradient, self.inputs.w13, 2, None)
        combine.push_weight_gradients(round_, parts, self.where.places)
        combine.announce_sent(round_)
        w13_gradient, w2_gradient = self._weight_gradients(round_, gate_up_gradient, activation, self.all_programs)
        gradient = self._combine_wait(round_, None, presummed=True)
        return gradient, combine.take_weight_gradients(round_, self.inputs.ids), w13_gradient, w2_gradient

    def _backward(self) -> tuple[Tensor, ...]:
        """The layer's own, from one forward pass again and again; each opens its round."""
        return torch.autograd.grad(self.result, self.leaves, self.inputs.gradient, retain_graph=True)

    def _on_all(self, round_: Round) -> Round:
        return round_._replace(programs=self.all_programs)
