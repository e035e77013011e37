"""In which ways `farskip bench layer` brings rows to the experts and back, and what each of them lets run meanwhile.

blocking         standard connectivity; a layer waits for its dispatch and its combine; every step has all
                 multiprocessors of the rank; results travel summed.
paper            FarSkip connectivity as arXiv 2511.11505 runs it, over our transport: whole collectives on the
                 communication stream; the experts wait for all of dispatch, sums leave behind them.
fused            FarSkip connectivity, ``expert_parallel.Pending`` as it is.
computation      the same as fused where all that others send is there already and nothing leaves; always with the
                 direct form of combine, whose stores then go to this rank's own memory.
computation_all  the same as blocking, likewise.
collectives      dispatch and combine of each layer one after the other, nothing else.
window           everything but the gate and the routed experts: what collectives may hide behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farskip_fused.bench.rounds import align, in_round
from farskip_fused.exchange_setup import warm_up_ids
from farskip_fused.expert_parallel import Pending
from farskip_fused.flight import Exchange, Flight
from farskip_fused.kernels import combine, dispatch, experts, experts_backward
from farskip_fused.kernels.layout import Layout
from farskip_fused.kernels.protocol import Round, SlotRows
from farskip_fused.local_experts import add_extras
from farskip_fused.moe import FusedExperts, FusedMoE
from farskip_fused.symmetric import SymmetricBuffer, SymmetricMemory
from farskip_fused.symmetric.local import LocalMemory
from farskip_fused.symmetric.slots import Slots, SlotShape, open_slots

OVERLAPPED = ("paper", "fused")
WAYS = ("blocking", *OVERLAPPED, "computation", "computation_all", "collectives", "window")
RAISED = 2**62  # a flag of every epoch


@dataclass(frozen=True)
class WholeExchange(Exchange):
    """Of ways that wait for whole collectives.

    everything: programs of GEMMs beside which nothing travels. blocking: whether nothing ever travels beside a GEMM.
    """

    everything: int = 1
    blocking: bool = False


def whole_exchange(exchange: Exchange, blocking: bool) -> WholeExchange:
    """The same ranks and slots for whole collectives; blocking ones have all multiprocessors."""
    values = {field.name: getattr(exchange, field.name) for field in fields(Exchange)}
    everything = exchange.all_programs
    share = {"programs": everything, "gemm_programs": everything} if blocking else {}
    return WholeExchange(**{**values, **share, "presummed": True}, everything=everything, blocking=blocking)


class WholeExperts(torch.autograd.Function):
    """As in expert_parallel, but no GEMM begins before all of its rows are here, and results leave behind it."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, w13: Tensor, w2: Tensor, flight: Flight) -> Tensor:
        exchange, round_ = flight.exchange, flight.round
        assert isinstance(exchange, WholeExchange)
        programs = exchange.everything
        received, where = flight.receive()
        flight.landed()
        dispatch.wait_rows(round_)
        turns = combine.find_turns(round_, received.experts, exchange.num_local_experts)
        rows, slot = exchange.slots.rows, SlotRows(round_, arrived=True)
        has_backward = any(ctx.needs_input_grad)
        if has_backward:
            rows = rows.new_empty(received.experts.shape[0], rows.shape[1])
            dispatch.keep_rows(round_._replace(programs=programs), received.experts, rows)
        gate_up, activated = experts.up_swiglu(
            rows, where, exchange.top_k, w13, has_backward, slot=None if has_backward else slot, programs=programs
        )
        dispatch.release(round_)
        values = experts.project(activated, where, w2, 1, programs=programs)
        flight.send_sums(round_, values, where.places, received.weights, turns)
        if gate_up is not None:
            ctx.flight, ctx.tile_rows = flight, where.tile_rows
            ctx.save_for_backward(received.weights, *where[:5], turns, rows, gate_up, w13, w2)
        return torch.empty_like(token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        flight: Flight = ctx.flight
        exchange, round_ = flight.exchange, flight.gradient_round
        assert isinstance(exchange, WholeExchange)
        weights, *layout, turns, rows, gate_up, w13, w2 = ctx.saved_tensors
        where, top_k, programs = Layout._make([*layout, ctx.tile_rows]), exchange.top_k, exchange.everything
        flight.landed()
        dispatch.wait_rows(round_)
        slot = SlotRows(round_, arrived=True)
        gate_up_gradient, activation, parts = experts_backward.down_gradient_swiglu(
            exchange.slots.rows, weights, where, w2, gate_up, slot=slot, programs=programs
        )
        values = experts.project(gate_up_gradient, where, w13, 2, programs=programs)
        flight.send_sums(round_, values, where.places, None, turns, parts)
        if exchange.blocking:
            flight.landed()
        w13_gradient = experts_backward.weight_gradient(
            gate_up_gradient, rows, where, top_k, False, programs=exchange.gemm_programs
        )
        w2_gradient = experts_backward.weight_gradient(
            exchange.slots.rows, activation, where, top_k, True, slot=slot, programs=exchange.gemm_programs
        )
        dispatch.release(round_)
        return rows.new_empty(0), w13_gradient, w2_gradient, None


class Collectives(torch.autograd.Function):
    """No experts: the same rows leave whatever came; values [C, H]."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, values: Tensor, flight: Flight) -> Tensor:
        received, where = flight.receive()
        flight.landed()
        dispatch.wait_rows(flight.round)
        turns = combine.find_turns(flight.round, received.experts, flight.exchange.num_local_experts)
        dispatch.release(flight.round)
        flight.send_sums(flight.round, values, where.places, received.weights, turns)
        ctx.flight, ctx.where, ctx.turns, ctx.values = flight, where, turns, values
        return torch.empty_like(token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor, None, None]:
        flight: Flight = ctx.flight
        flight.landed()
        dispatch.wait_rows(flight.gradient_round)
        dispatch.release(flight.gradient_round)
        flight.send_sums(flight.gradient_round, ctx.values, ctx.where.places, None, ctx.turns)
        return torch.empty_like(token), None, None


class WholePending(Pending):
    """A round of whole collectives."""

    def experts(self) -> None:
        self._computed = WholeExperts.apply(self._token, *self._weights, self._flight)
        self._flight.check()


class CollectivesPending(Pending):
    """A round without experts; in the place of w13, the values that leave."""

    def experts(self) -> None:
        self._computed = Collectives.apply(self._token, self._weights[0], self._flight)
        self._flight.check()


class _ArrivedFlight(Flight):
    """Nothing leaves: rows and routing of all ranks have been in the slots since ``ArrivedMemory.fill``."""

    def send(self, hidden_states: Tensor, top_k_weights: Tensor) -> None:
        self.held = False
        self.ticket, self.round = self.exchange.open_round()
        self.gradient_ticket, self.gradient_round = self.ticket, self.round
        self._raise_row_flags(self.round)

    def send_gradient(self, gradient: Tensor, hidden_states: Tensor | None) -> None:
        self.gradient_ticket, self.gradient_round = self.exchange.open_round()
        self._raise_row_flags(self.gradient_round)

    def _raise_row_flags(self, round_: Round) -> None:
        """GEMMs compare these with the epoch itself."""
        memory = self.exchange.slots.memory
        assert isinstance(memory, ArrivedMemory)
        with self.exchange.beside():
            memory.row_flags.copy_(round_.ticket[:1].expand_as(memory.row_flags))
        self.mark = self.exchange.mark()


class ArrivedPending(Pending):
    _new_flight = _ArrivedFlight


class ArrivedWholePending(WholePending, ArrivedPending):
    pass


class ArrivedMemory(LocalMemory):
    """This rank alone, in the place of the others too: what it stores at them it stores in its own memory, and all
    that it waits for has come."""

    backend = "arrived"
    row_flags: Tensor

    def __init__(self, memory: SymmetricMemory) -> None:
        SymmetricMemory.__init__(self, memory.rank, memory.world, memory.device, memory.timeout)

    def fill(self, shape: SlotShape, ids: Tensor, weights: Tensor) -> Slots:
        """Slots of that shape with rows and the routing of all ranks, ids and weights [world, T, K], in each."""
        slots = open_slots(self, shape)
        regions, offset = {}, 0
        for name, size in shape.regions(self.world).items():
            regions[name] = slots.buffer.memory[offset : offset + size]
            offset += size
        for name in ("routing_arrival", "rows_arrival", "dispatch_credit", "combine_arrival", "combine_credit"):
            regions[name].view(torch.int64).fill_(RAISED)
        self.row_flags = regions["row_arrival"].view(torch.int32)
        counts = shape.depth * self.world
        regions["dispatch_counts"].view(torch.int32)[:counts].fill_(ids.shape[1])
        for name, values in (("dispatch_experts", ids), ("dispatch_weights", weights)):
            whole = regions[name].view(values.dtype)[: shape.depth * values.numel()]
            whole.view(shape.depth, *values.shape).copy_(values)
        slots.rows.normal_()
        return slots

    def allocate(self, nbytes: int) -> SymmetricBuffer:
        memory, addresses = super().allocate(nbytes)
        return SymmetricBuffer(memory, addresses * self.world)

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world


@dataclass(frozen=True)
class Way:
    """connectivity: of the layers that run it. pending: makes a round of ``exchange``."""

    connectivity: str
    exchange: Exchange
    pending: Callable[..., Any]

    def start(self, *arguments: Tensor) -> Any:
        """hidden_states, top_k_index, top_k_weights, w13, w2, as ``Pending`` takes them."""
        pending = self.pending(self.exchange, *arguments)
        if not (isinstance(self.exchange, WholeExchange) and self.exchange.blocking):
            return pending
        pending.experts()
        return Finished(pending.finish())


class Finished:
    """What ``start`` gives where it has waited for everything."""

    def __init__(self, result: Tensor) -> None:
        self._result = result

    def experts(self) -> None:
        """Nothing is left to do."""

    def finish(self, *, shared: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        return add_extras(self._result, shared, residual)


class MeasuredMoE(FusedMoE):
    """Its rounds are those of ``way``; its gate computes what a router does, and then the ids of ``use_routing`` count:
    the same for every way."""

    way: Way

    def use_routing(self, ids: Tensor) -> None:
        self.gate = FixedIds(self.gate, ids)  # type: ignore[assignment]

    def dispatch(self, *routed: Tensor, hold: bool = False) -> Any:
        return self.way.start(*routed, self.w13, self.w2)

    def share_setup(self, other: MeasuredMoE) -> None:
        """Use what ``other`` has set up, of the same sizes."""
        self._exchange, self._is_set_up = other.exchange, True

    @property
    def exchange(self) -> Exchange:
        assert self._exchange is not None
        return self._exchange

    def _warm_up(self, exchange: Exchange) -> None:
        FusedExperts._warm_up(self, exchange)  # without the gate: a pass without peers loads it for the tokens it gets
        in_round(exchange, align)
        ids = warm_up_ids(exchange)
        for blocking in (False, True):
            for has_backward in (False, True):
                with torch.set_grad_enabled(has_backward):
                    x = self.w13.new_zeros(len(ids), self.w13.shape[2], requires_grad=True)
                    weights = torch.ones(ids.shape, device=x.device, requires_grad=True)
                    pending = WholePending(whole_exchange(exchange, blocking), x, ids, weights, self.w13, self.w2)
                    result = pending.finish()
                    if has_backward:
                        torch.autograd.grad(result.sum(), [x, weights, self.w13, self.w2])


class FixedIds(torch.nn.Module):
    """A router's weights for experts that are given: its cost and its gradients without its choice."""

    def __init__(self, router: torch.nn.Module, ids: Tensor) -> None:
        super().__init__()
        self.router, self.ids = router, ids

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        _, weights = self.router(hidden_states)
        return self.ids, weights


class NoMoE(torch.nn.Module):
    """In the place of gate and routed experts."""

    is_alone = True

    def __init__(self, slot_shape: SlotShape) -> None:
        super().__init__()
        self.slot_shape = slot_shape

    def start(self, hidden_states: Tensor, *, hold: bool = False) -> Finished:
        return Finished(hidden_states)
