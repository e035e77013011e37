"""One pass of tokens through experts that live on several ranks, in three steps, forward and backward.

Three autograd functions, one a step, so that backward has the same seams as forward: the gradient of combine is a
dispatch, that of the experts stays where they are, that of dispatch is a combine. What travels between the functions
is a token of one element; the data lies in the slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farskip_fused.kernels import combine, dispatch, experts, experts_backward, layout
from farskip_fused.kernels.dispatch import Received
from farskip_fused.kernels.experts_to_owner import project_to_owner
from farskip_fused.kernels.layout import Layout
from farskip_fused.kernels.machine import INTERPRETED, aligned
from farskip_fused.symmetric.slots import Slots

# The same for any number of tokens: loading another variant of a kernel while one waits for a peer would deadlock.
TILE_ROWS = 32 if INTERPRETED else 64


class _Round:
    """What the steps of one round share; small tensors only, the large ones are saved by autograd."""

    def __init__(self, slots: Slots, top_k_index: Tensor, num_local_experts: int) -> None:
        self.slots = slots
        self.top_k_index = top_k_index
        self.world = slots.memory.world
        self.num_local_experts = num_local_experts
        self.ticket = slots.open_round()
        self.positions, self.counts = layout.send_layout(slots.context, top_k_index, self.world, num_local_experts)
        # Alone, the number of rows is known; otherwise every peer may send as many as it may have.
        self.rows_per_source = top_k_index.shape[0] if self.world == 1 else slots.shape.max_tokens
        self.gradient_ticket = self.ticket  # that of the round which carries the gradients, once it is open
        self.combined: Tensor | None = None

    @property
    def context(self) -> Tensor:
        return self.slots.context


def _combine(state: _Round, top_k_weights: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    """Wait for the round's results, sum them and end the round."""
    result = combine.combine(
        state.context, state.ticket.epoch, state.world, state.top_k_index, top_k_weights, hidden, dtype
    )
    combine.release(state.context, state.ticket.epoch, state.world)
    state.slots.close_round(state.ticket)
    return result


def _is_recomputing() -> bool:
    """Whether this runs inside a backward pass, as activation checkpointing's recomputation does."""
    return torch._C._current_graph_task_id() != -1


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, top_k_weights: Tensor, state: _Round) -> Tensor:
        ctx.state = state
        dispatch.dispatch_send(
            state.context, state.ticket.epoch, hidden_states, state.top_k_index, top_k_weights,
            state.positions, state.counts, state.num_local_experts,
        )  # fmt: skip
        ctx.hidden, ctx.dtype = hidden_states.shape[1], hidden_states.dtype
        return torch.zeros(1, device=hidden_states.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor, None]:
        state: _Round = ctx.state
        ticket = state.gradient_ticket.epoch
        gradient = combine.combine(state.context, ticket, state.world, state.top_k_index, None, ctx.hidden, ctx.dtype)
        weights_gradient = combine.take_weight_gradients(state.context, ticket, state.top_k_index)
        combine.release(state.context, ticket, state.world)
        state.slots.close_round(state.gradient_ticket)
        state.slots.memory.check()
        return gradient, weights_gradient, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, w13: Tensor, w2: Tensor, top_k_weights: Tensor, state: _Round) -> Tensor:
        top_k = state.top_k_index.shape[1]
        received = dispatch.dispatch_receive(
            state.context, state.ticket.epoch, state.world, state.rows_per_source, w13.shape[2], top_k, w13.dtype
        )
        num_local_experts = w13.shape[0]
        capacity = received.rows.shape[0] * min(top_k, num_local_experts)
        where = layout.expert_layout(
            state.context, received.experts, received.counts, state.rows_per_source, num_local_experts, capacity,
            TILE_ROWS,
        )  # fmt: skip
        gate_up, activated = experts.up_swiglu(received.rows, where, top_k, w13, keep_gate_up=True)
        project_to_owner(state.context, state.ticket.epoch, activated, received, where, w2, 1, state.rows_per_source)
        if _is_recomputing():
            # Recomputation stops at the last tensor that somebody saved, perhaps before this round's finish(), and in
            # an overlapped stack finish() belongs to the next layer: nobody else would end the round.
            state.combined = _combine(state, top_k_weights, w13.shape[2], w13.dtype)
        ctx.state = state
        ctx.save_for_backward(*received, *where[:5], gate_up, w13, w2)
        return torch.zeros_like(token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        state: _Round = ctx.state
        *parts, gate_up, w13, w2 = ctx.saved_tensors
        received, where = Received(*parts[:5]), Layout._make([*parts[5:], TILE_ROWS])
        top_k = received.experts.shape[1]
        ticket = state.gradient_ticket.epoch
        output_gradient = dispatch.gradient_receive(
            state.context, ticket, received.counts, state.rows_per_source, received.rows
        )
        gate_up_gradient, weighted_activation, weight_parts = experts_backward.down_gradient_swiglu(
            output_gradient, received.weights, where, w2, gate_up
        )
        token_gradient, w13_gradient, w2_gradient = None, None, None
        if ctx.needs_input_grad[0]:
            project_to_owner(
                state.context, ticket, gate_up_gradient, received, where, w13, 2, state.rows_per_source, weight_parts
            )
            token_gradient = torch.zeros(1, device=w13.device)
        else:
            # Nobody waits for these gradients: neither the input nor the router needs one, on any rank.
            combine.release(state.context, ticket, state.world)
            state.slots.close_round(state.gradient_ticket)
        if ctx.needs_input_grad[1]:
            w13_gradient = experts_backward.weight_gradient(
                gate_up_gradient, received.rows, where, top_k, gather_left=False
            )
        if ctx.needs_input_grad[2]:
            w2_gradient = experts_backward.weight_gradient(
                output_gradient, weighted_activation, where, top_k, gather_left=True
            )
        state.slots.memory.check()
        return token_gradient, w13_gradient, w2_gradient, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token: Tensor, top_k_weights: Tensor, hidden: int, dtype: torch.dtype, state: _Round
    ) -> Tensor:
        ctx.state = state
        if state.combined is None:
            return _combine(state, top_k_weights, hidden, dtype)
        return state.combined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        state: _Round = ctx.state
        state.gradient_ticket = state.slots.open_round()
        dispatch.gradient_send(state.context, state.gradient_ticket.epoch, aligned(gradient), state.positions)
        state.slots.memory.check()
        return torch.zeros(1, device=gradient.device), None, None, None, None


class Pending:
    """A round in flight; made by ``start``. Every rank must take the same steps in the same order."""

    def __init__(
        self, slots: Slots, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, w13: Tensor, w2: Tensor
    ) -> None:
        self.output_shape = hidden_states.shape
        self._dtype = hidden_states.dtype
        self._weights = (w13, w2)
        # The router-weight gradient comes back with dispatch's, so combine sees the weights without their graph.
        self._top_k_weights = top_k_weights.detach()
        self._state = _Round(slots, top_k_index, w13.shape[0])
        self._token = _Dispatch.apply(hidden_states, top_k_weights, self._state)
        self._computed: Tensor | None = None
        self._finished = False
        slots.memory.check()

    def experts(self) -> None:
        """Launch the expert GEMMs on what arrives; their results go straight to the owners of the tokens."""
        if self._computed is not None:
            raise RuntimeError("experts() was called twice on one pending round; call it once, or only finish().")
        self._computed = _Experts.apply(self._token, *self._weights, self._top_k_weights, self._state)
        self._state.slots.memory.check()

    def finish(self) -> Tensor:
        """Wait for the results and return their weighted sum, shaped as the input; calls ``experts`` if nobody has."""
        if self._finished:
            raise RuntimeError("finish() was called twice on one pending round; keep its first result.")
        if self._computed is None:
            self.experts()
        self._finished = True
        result = _Combine.apply(self._computed, self._top_k_weights, self.output_shape[-1], self._dtype, self._state)
        self._state.slots.memory.check()
        return result.reshape(self.output_shape)
