"""One pass of tokens through experts that live on several ranks, in three steps, forward and backward.

Three autograd functions, one a step, so that backward has the same seams as forward: the gradient of combine is a
dispatch, that of the experts stays where they are, that of dispatch is a combine. What travels between the functions
is a token without elements; the data lies in the slots.

Sending runs on a stream of its own with a share of the GPU's multiprocessors, the experts' GEMMs on the rest: they
start on the rows that are there (by puts and as fp8 once all are) and store their results straight at the owners of the
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farskip_fused.flight import Exchange, Flight
from farskip_fused.kernels import combine, dispatch, experts, experts_backward
from farskip_fused.kernels.combine import Extras
from farskip_fused.kernels.dispatch import Received
from farskip_fused.kernels.experts_to_owner import project_to_owner
from farskip_fused.kernels.layout import Layout
from farskip_fused.kernels.machine import aligned
from farskip_fused.kernels.protocol import Round, SlotRows
from farskip_fused.local_experts import add_extras, is_recomputing


class Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, top_k_weights: Tensor, flight: Flight, hold: bool = False) -> Tensor:
        ctx.flight = flight
        if not hold:
            flight.send(hidden_states, top_k_weights)
        return hidden_states.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor, Tensor, None, None]:
        flight: Flight = ctx.flight
        exchange, round_, shape = flight.exchange, flight.gradient_round, flight.exchange.slots.shape
        flight.landed()
        presummed_by = exchange.num_local_experts if exchange.presummed else 0
        gradient, _ = combine.combine_wait(
            round_, flight.top_k_index, None, shape.hidden_size, shape.dtype, presummed_by
        )  # fmt: skip
        weights_gradient = combine.take_weight_gradients(round_, flight.top_k_index)
        combine.release(round_)
        exchange.slots.close_round(flight.gradient_ticket)
        flight.check()
        return gradient, weights_gradient, None, None


class _Saved(NamedTuple):
    """What backward needs of the experts' forward pass. rows: kept ones, or empty. turns: of ``combine.find_turns``."""

    received: Received
    where: Layout
    rows: Tensor
    turns: Tensor
    gate_up: Tensor
    w13: Tensor
    w2: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.received, *self.where[:5], self.rows, self.turns, self.gate_up, self.w13, self.w2)

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor], tile_rows: int) -> _Saved:
        return cls(Received(*tensors[:2]), Layout._make([*tensors[2:7], tile_rows]), *tensors[7:])


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token: Tensor, w13: Tensor, w2: Tensor, top_k_weights: Tensor, flight: Flight,
        main_grads: Sequence[Tensor | None],
    ) -> Tensor:  # fmt: skip
        exchange, round_ = flight.exchange, flight.round
        received, where = flight.receive()
        has_backward = any(ctx.needs_input_grad)
        slot, programs = flight.rows(round_, whole=exchange.fp8)
        kept = w13.new_empty(0)
        if exchange.fp8 or (exchange.keep_received and ctx.needs_input_grad[1]):
            kept = flight.keep_rows(received, slot, programs)
        gate_up, activated = experts.up_swiglu(
            kept if exchange.fp8 else exchange.slots.rows, where, exchange.top_k, w13, has_backward,
            slot=None if exchange.fp8 else slot, programs=programs,
        )  # fmt: skip
        flight.landed()
        turns = w13.new_empty(0)
        if exchange.presummed:
            turns = combine.find_turns(round_, received.experts, exchange.num_local_experts)
        # Waits once more, and so reports what the GEMM has waited for in vain.
        dispatch.release_arrived(round_, then_send=not exchange.presummed)
        _return(flight, round_, activated, where, w2, 1, received.weights, turns)
        if is_recomputing():
            # Recomputation stops at the last tensor that somebody saved, perhaps before this round's finish(), and in
            # an overlapped stack finish() belongs to the next layer: nobody else would end the round.
            flight.combined, _ = flight.finish(top_k_weights)
        if gate_up is not None:
            ctx.flight, ctx.main_grads = flight, main_grads
            ctx.save_for_backward(*_Saved(received, where, kept, turns, gate_up, w13, w2).tensors())
        return torch.empty_like(token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        flight: Flight = ctx.flight
        exchange, round_ = flight.exchange, flight.gradient_round
        saved = _Saved.from_tensors(ctx.saved_tensors, exchange.tile_rows)
        where, top_k = saved.where, exchange.top_k
        slot, programs = flight.rows(round_)
        gate_up_gradient, weighted_activation, weight_parts = experts_backward.down_gradient_swiglu(
            exchange.slots.rows, saved.received.weights, where, saved.w2, saved.gate_up, slot=slot, programs=programs
        )
        flight.landed()
        again = exchange.slots.shape.planes > 1 and ctx.needs_input_grad[1]
        inputs = SlotRows(round_, plane=1) if again else None
        slot = slot.wait()
        if inputs is not None:
            inputs = inputs.wait()
        dispatch.poison_if_failed(round_.context, gate_up_gradient, weighted_activation)
        token_gradient, programs = None, flight.programs_once_landed()
        if ctx.needs_input_grad[0]:
            if exchange.presummed:
                programs = exchange.gemm_programs  # the sums travel beside what follows
            else:
                combine.wait_to_send(round_)
            _return(flight, round_, gate_up_gradient, where, saved.w13, 2, None, saved.turns, weight_parts)
            token_gradient = saved.w13.new_empty(0)
        else:
            # Nobody waits for these gradients: neither the input nor the router needs one, on any rank.
            combine.release(round_)
            exchange.slots.close_round(flight.gradient_ticket)
        gradients: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[1]:
            rows = saved.rows if inputs is None else exchange.slots.rows
            gradients[0] = experts_backward.weight_gradient(
                gate_up_gradient, rows, where, top_k, False, ctx.main_grads[0], inputs, programs
            )
        if ctx.needs_input_grad[2]:
            gradients[1] = experts_backward.weight_gradient(
                exchange.slots.rows, weighted_activation, where, top_k, True, ctx.main_grads[1], slot, programs
            )
        dispatch.release(round_)
        flight.check()
        added = [main is not None for main in ctx.main_grads]
        w13_gradient, w2_gradient = (None if into else value for value, into in zip(gradients, added, strict=True))
        return token_gradient, w13_gradient, w2_gradient, None, None, None


def _return(
    flight: Flight, round_: Round, inputs: Tensor, where: Layout, weight: Tensor, column_dim: int,
    weights: Tensor | None, turns: Tensor, weight_parts: Tensor | None = None,
) -> None:  # fmt: skip
    """Multiply sorted inputs by each expert's matrix and bring the rows to the owners of the tokens: each as soon as it
    is computed, to slots that are free by now, or, summed, behind the product on the communication stream, where they
    hide behind what comes next.

    weight_parts: of the router weights' gradients, which travel along.
    """
    exchange, programs = flight.exchange, flight.programs_once_landed()
    if not exchange.presummed:
        if weight_parts is not None:
            combine.push_weight_gradients(round_, weight_parts, where.places)
        project_to_owner(round_, inputs, where, exchange.top_k, weight, column_dim, programs)
        combine.announce_sent(round_)
        return
    values = experts.project(inputs, where, weight, column_dim, programs=programs)
    flight.send_sums(round_, values, where.places, weights, turns, weight_parts)


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token: Tensor, top_k_weights: Tensor | None, hidden_states: Tensor | None, shared: Tensor | None,
        residual: Tensor | None, flight: Flight,
    ) -> Tensor:  # fmt: skip
        ctx.flight = flight
        # Not saved by autograd: in an overlapped stack this runs in the next layer's turn, but not when that turn is
        # recomputed, and activation checkpointing would miss it.
        ctx.hidden_states = hidden_states if flight.exchange.slots.shape.planes > 1 else None
        if flight.combined is not None:
            return add_extras(flight.combined, shared, residual)
        result, _ = flight.finish(top_k_weights, Extras(residual, shared))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flight: Flight = ctx.flight
        needs = ctx.needs_input_grad
        if needs[0]:
            flight.send_gradient(aligned(gradient), ctx.hidden_states)
            flight.check()
        token = gradient.new_empty(0) if needs[0] else None
        return token, None, None, gradient if needs[3] else None, gradient if needs[4] else None, None


class Pending:
    """A round in flight; made by ``start``. Every rank must take the same steps in the same order.

    hold: dispatch at ``experts()`` only.
    """

    _new_flight = Flight

    def __init__(
        self, exchange: Exchange, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, w13: Tensor,
        w2: Tensor, main_grads: Sequence[Tensor | None] | None = None, hold: bool = False,
    ) -> None:  # fmt: skip
        self.output_shape = hidden_states.shape
        # Autograd functions see that a weight requires a gradient even where none is recorded, and would keep for it.
        self._weights = (w13, w2) if torch.is_grad_enabled() else (w13.detach(), w2.detach())
        self._main_grads = main_grads or (None, None)
        # The router-weight gradient comes back with dispatch's, so combine sees the weights without their graph.
        self._top_k_weights = top_k_weights.detach()
        self._hidden_states = hidden_states.detach()
        self._flight = self._new_flight(exchange, top_k_index)
        self._token = Dispatch.apply(hidden_states, top_k_weights, self._flight, hold)
        self._computed: Tensor | None = None
        self._finished = False
        self._flight.check()

    def experts(self) -> None:
        """Launch the expert GEMMs on what arrives; their results go straight to the owners of the tokens.

        Called again while activations are recomputed it is a round of its own, for what its backward pass needs.
        """
        if self._computed is not None:
            if not is_recomputing():
                raise RuntimeError("experts() was called twice on one pending round; call it once, or only finish().")
            self._flight = self._new_flight(self._flight.exchange, self._flight.top_k_index)
        if self._flight.held:
            self._flight.send(self._hidden_states, self._top_k_weights)
        self._computed = _Experts.apply(
            self._token, *self._weights, self._top_k_weights, self._flight, self._main_grads
        )
        self._flight.check()

    def finish(self, *, shared: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Wait for the results and return their weighted sum, shaped as the input; calls ``experts`` if nobody has.

        shared, residual: of the input's shape and dtype, added to it in the same kernel, in that order.
        Raises RuntimeError when called twice; from this and the other steps PeerTimeout names a lost peer.
        """
        if self._finished:
            raise RuntimeError("finish() was called twice on one pending round; keep its first result.")
        if self._computed is None:
            self.experts()
        self._finished = True
        shape = self._hidden_states.shape
        extras = [None if extra is None else aligned(extra.reshape(shape)) for extra in (shared, residual)]
        result: Tensor = Combine.apply(self._computed, self._top_k_weights, self._hidden_states, *extras, self._flight)
        self._flight.check()
        return result.reshape(self.output_shape)
