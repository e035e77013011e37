"""The layer's rounds over NCCL, for `farskip bench layer` where every rank has a GPU: what a trainer has without us.

Rows travel by ``all_to_all_single``, one a token and rank that wants it, with the router's weights beside them; the
experts are our GEMMs, and their sums come back the same way, to be added by torch's ``embedding_bag``. NCCL is given
what it usually has to wait for: the sizes are known to the host beforehand, and so are the expert ids, which do not
travel. How many multiprocessors it takes is its own choice.

nccl_blocking  standard connectivity; every layer waits for both.
nccl_streams   FarSkip connectivity as arXiv 2511.11505 runs it: whole collectives on the communication stream.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from farskip_fused.bench.layer_ways import WholeExchange
from farskip_fused.bench.shapes import Routes
from farskip_fused.kernels import experts, experts_backward, gather_sum, layout
from farskip_fused.kernels.layout import Layout
from farskip_fused.local_experts import add_extras
from farskip_fused.symmetric.interface import Mark, join

NCCL_WAYS = ("nccl_blocking", "nccl_streams")


@dataclass(frozen=True, kw_only=True)
class NcclExchange(WholeExchange):
    routes: Routes
    group: Any


def nccl_exchange(exchange: WholeExchange, routes: Routes, group: Any) -> NcclExchange:
    values = {field.name: getattr(exchange, field.name) for field in fields(WholeExchange)}
    return NcclExchange(**values, routes=routes, group=group)


class NcclFlight:
    """What the steps of a round share. arrived: rows and what came with them; returned: likewise, at the owners."""

    def __init__(self, exchange: NcclExchange) -> None:
        self.exchange = exchange
        self.arrived: list[Tensor] = []
        self.returned: list[Tensor] = []
        self._leaving: list[Tensor] = []
        self._mark: Mark | None = None

    def send_to_experts(self, *values: Tensor) -> None:
        """Launch [T, .] to the ranks of their experts; ``arrived`` are [R, .]."""
        routes = self.exchange.routes
        self.arrived = [value.new_empty(len(routes.ids), value.shape[1]) for value in values]
        with self.exchange.beside():
            chosen = [value.index_select(0, routes.order) for value in values]
            for into, value in zip(self.arrived, chosen, strict=True):
                dist.all_to_all_single(into, value, routes.received, routes.sent, group=self.exchange.group)
        self._leaving, self._mark = [*values, *chosen], self.exchange.slots.memory.mark(0)

    def send_to_owners(self, *values: Tensor) -> None:
        """Launch [R, .] back to the ranks of their tokens; ``returned`` are [S + 1, .], the last of no token."""
        routes = self.exchange.routes
        self.returned = [value.new_empty(len(routes.order) + 1, value.shape[1]) for value in values]
        with self.exchange.beside():
            for into, value in zip(self.returned, values, strict=True):
                dist.all_to_all_single(into[:-1], value, routes.sent, routes.received, group=self.exchange.group)
        self._leaving, self._mark = list(values), self.exchange.slots.memory.mark(0)

    def landed(self) -> None:
        """Let this stream wait for what is under way."""
        join(self._mark)
        self._leaving, self._mark = [], None

    def take_arrived(self) -> list[Tensor]:
        self.landed()
        taken, self.arrived = self.arrived, []
        return taken

    def take_sums(self) -> list[Tensor]:
        """[T, .], each the sum of what all ranks returned for a token."""
        self.landed()
        taken, self.returned = self.returned, []
        return [self.exchange.routes.sum_at_owner(value) for value in taken]


class Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, top_k_weights: Tensor, flight: NcclFlight) -> Tensor:
        ctx.flight = flight
        flight.send_to_experts(hidden_states, top_k_weights)
        return hidden_states.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor, None]:
        gradient, weights_gradient = ctx.flight.take_sums()
        return gradient, weights_gradient, None


class Experts(torch.autograd.Function):
    """As ``layer_ways.WholeExperts``: no GEMM begins before all of its rows are here; weight gradients come last."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, w13: Tensor, w2: Tensor, flight: NcclFlight) -> Tensor:
        exchange: NcclExchange = flight.exchange
        rows, weights = flight.take_arrived()
        where = layout.local_layout(exchange.routes.ids, exchange.num_local_experts, exchange.tile_rows)
        has_backward = any(ctx.needs_input_grad)
        gate_up, activated = experts.up_swiglu(
            rows, where, exchange.top_k, w13, has_backward, programs=exchange.everything
        )
        values = experts.project(activated, where, w2, 1, programs=exchange.everything)
        flight.send_to_owners(gather_sum.sum_entries(values, where.places, weights))
        if gate_up is not None:
            ctx.flight, ctx.tile_rows = flight, where.tile_rows
            ctx.save_for_backward(weights, *where[:5], rows, gate_up, w13, w2)
        return torch.empty_like(token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        flight: NcclFlight = ctx.flight
        exchange = flight.exchange
        weights, *parts, rows, gate_up, w13, w2 = ctx.saved_tensors
        where, top_k, programs = Layout._make([*parts, ctx.tile_rows]), exchange.top_k, exchange.everything
        (gradient,) = flight.take_arrived()
        gate_up_gradient, activation, weight_parts = experts_backward.down_gradient_swiglu(
            gradient, weights, where, w2, gate_up, programs=programs
        )
        values = experts.project(gate_up_gradient, where, w13, 2, programs=programs)
        flight.send_to_owners(
            gather_sum.sum_entries(values, where.places, None), gather_sum.sum_parts(weight_parts, where.places)
        )
        if exchange.blocking:
            flight.landed()
        programs = exchange.gemm_programs
        w13_gradient = experts_backward.weight_gradient(gate_up_gradient, rows, where, top_k, False, programs=programs)
        w2_gradient = experts_backward.weight_gradient(gradient, activation, where, top_k, True, programs=programs)
        return rows.new_empty(0), w13_gradient, w2_gradient, None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, flight: NcclFlight) -> Tensor:
        ctx.flight = flight
        (result,) = flight.take_sums()
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.flight.send_to_experts(gradient.contiguous())
        return gradient.new_empty(0), None


class NcclPending:
    """A round over NCCL, in the steps of ``expert_parallel.Pending``."""

    def __init__(
        self, exchange: NcclExchange, hidden_states: Tensor, _: Tensor, top_k_weights: Tensor, w13: Tensor, w2: Tensor
    ) -> None:
        """``_``: expert ids, which the exchange has known for long."""
        self._flight, self._weights = NcclFlight(exchange), (w13, w2)
        self._token = Dispatch.apply(hidden_states, top_k_weights.float(), self._flight)
        self._computed: Tensor | None = None

    def experts(self) -> None:
        self._computed = Experts.apply(self._token, *self._weights, self._flight)

    def finish(self, *, shared: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        if self._computed is None:
            self.experts()
        return add_extras(Combine.apply(self._computed, self._flight), shared, residual)
