"""Dispatch and combine for experts that are the caller's own, each split into a call that sends and one that waits.

    handle = dispatch_send(exchange, hidden_states, top_k_index, top_k_weights)
    rows, offsets = dispatch_wait(handle)
    combine_send(handle, experts(rows, offsets))
    result = combine_wait(handle)

Whatever is launched between a send and its wait runs while rows travel. Autograd goes through all four: the gradient
of combine is a dispatch along the same layout, that of dispatch a combine. Results are summed at the rank of the
experts before they travel, one row a rank and token (``kernels/combine.py``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farskip_fused.checks import (
    check_hidden_states,
    check_not_capturing,
    check_routing,
    check_sizes,
    check_tensor,
    check_tokens,
    to_global_ids,
)
from farskip_fused.errors import UsageError
from farskip_fused.exchange_setup import ExchangeOptions, set_up, size_hint, warm_up_ids
from farskip_fused.expert_parallel import Combine, Dispatch
from farskip_fused.flight import Exchange, Flight
from farskip_fused.kernels import combine, dispatch, gather_sum
from farskip_fused.kernels.combine import Extras
from farskip_fused.kernels.dispatch import Received
from farskip_fused.kernels.layout import Layout
from farskip_fused.kernels.machine import aligned
from farskip_fused.kernels.protocol import SlotRows
from farskip_fused.local_experts import is_recomputing
from farskip_fused.symmetric import SymmetricMemory
from farskip_fused.symmetric.slots import MINIMUM_DEPTH, SlotShape

STEPS = ("dispatch_send", "dispatch_wait", "combine_send", "combine_wait")


class TokenExchange:
    """What rounds of dispatch and combine between the ranks of ``ep`` share; layers of one shape may share one.

    hidden_size, num_experts, top_k, dtype: of the rows and their routing; ``num_experts`` is a multiple of the world
        size, rank r holds experts [r * E_local, (r + 1) * E_local); dtype None for torch's default.
    max_tokens: most tokens that this rank, and any other, sends in one round.
    depth: rounds in flight, at least 2.
    options: how rows travel. ``combine`` is "presummed" whatever it says; ``keep_received`` must stay True, as received
        rows belong to the caller.
    ``setup`` must be called, on every rank, before the first round.
    Raises UsageError or TypeError for impossible sizes, UsageError for ``keep_received=False``.
    """

    def __init__(
        self,
        ep: SymmetricMemory,
        *,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        max_tokens: int,
        dtype: torch.dtype | None = None,
        depth: int = MINIMUM_DEPTH,
        options: ExchangeOptions | None = None,
    ) -> None:
        sizes = {"hidden_size": hidden_size, "num_experts": num_experts, "top_k": top_k, "max_tokens": max_tokens}
        dtype = dtype or torch.get_default_dtype()
        check_sizes(sizes, ep.world, dtype)
        options = options or ExchangeOptions()
        if not options.keep_received:
            raise UsageError("keep_received=False was given; rows of a TokenExchange are the caller's, leave it True.")
        self.ep, self.num_experts = ep, num_experts
        self.options = replace(options, combine="presummed")
        self.slot_shape = SlotShape(max_tokens, hidden_size, top_k, dtype, depth, fp8=options.fp8, staged=ep.by_put)
        self._exchange: Exchange | None = None

    def size_hint(self) -> dict[str, int]:
        """Bytes of symmetric memory at each rank by region, and their "total"; allocates nothing."""
        return size_hint(self.slot_shape, self.ep.world)

    def setup(self) -> None:
        """Allocate the slots (shared with layers of the same shape) and load every kernel; collective.

        Raises RuntimeError inside CUDA-graph capture.
        """
        check_not_capturing(self.ep.device)
        self._exchange = set_up(self.ep, self.slot_shape, self.num_experts, self.options, self._warm_up)

    def _warm_up(self, exchange: Exchange) -> None:
        """Launch every variant of every kernel once, with backward and without."""
        shape, device = self.slot_shape, self.ep.device
        ids = warm_up_ids(exchange)
        weights = torch.ones(ids.shape, device=device)
        x = torch.zeros(len(ids), shape.hidden_size, device=device, dtype=shape.dtype)
        for norm_weight in (None, x[0]):
            for shared, residual in ((None, None), (x, None), (None, x), (x, x)):
                handle = Handle(exchange, x, ids, weights)
                handle.send(handle.receive().rows)
                handle.finish(shared, residual, norm_weight, 1e-6)
        with torch.enable_grad():
            handle = Handle(exchange, x.requires_grad_(), ids, weights)
            handle.send(handle.receive().rows)
            result, _ = handle.finish(None, None, None, 0.0)
            result.sum().backward()


class ReceivedRows(NamedTuple):
    """What the experts of this rank compute on.

    rows: [C, H], one for each (token, expert) pair, sorted by expert; C is the most there can be, the same each round.
    offsets: [E_local + 1] int32 on the device: local expert e has the rows from offsets[e] to offsets[e + 1], by rank
        and number of their tokens. Rows past offsets[-1] are undefined, and so are the gradients of outputs there.
    """

    rows: Tensor
    offsets: Tensor


class _Arrival(NamedTuple):
    """What is known of a round's entries once the routing of all ranks is here; ``combine.find_turns`` has turns."""

    received: Received
    where: Layout
    turns: Tensor


class Handle:
    """A round in flight; made by ``dispatch_send``. Its methods trust their arguments and their order."""

    def __init__(self, exchange: Exchange, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        self.tokens = hidden_states.shape[0]
        self.next_step = 1
        self.flight = Flight(exchange, top_k_index)
        self._arrival: _Arrival | None = None
        self._token = Dispatch.apply(hidden_states, top_k_weights, self.flight)
        self.flight.check()

    def receive(self) -> ReceivedRows:
        flight = self.flight
        received, where = flight.receive()
        turns = combine.find_turns(flight.round, received.experts, flight.exchange.num_local_experts)
        self._arrival = _Arrival(received, where, turns)
        rows, self._token = _Receive.apply(self._token, self._arrival, flight)
        flight.check()
        return ReceivedRows(rows, where.offsets)

    def send(self, outputs: Tensor) -> None:
        self._token = _Return.apply(self._token, outputs, self._arrival, self.flight)
        self._arrival = None
        self.flight.check()

    def finish(
        self, shared: Tensor | None, residual: Tensor | None, norm_weight: Tensor | None, norm_epsilon: float
    ) -> tuple[Tensor, Tensor | None]:
        normed = None
        if norm_weight is None:
            result = Combine.apply(self._token, None, None, shared, residual, self.flight)
        else:
            result, normed = self.flight.finish(None, Extras(residual, shared, norm_weight, norm_epsilon))
        self.flight.check()
        return result, normed

    def requires_grad(self, *others: Tensor | None) -> bool:
        tensors = (self._token, *others)
        return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)

    def check_step(self, step: str) -> None:
        number = STEPS.index(step)
        if number < self.next_step:
            raise RuntimeError(f"{step}() was called twice on one handle; keep what its first call returned.")
        if number > self.next_step:
            raise RuntimeError(
                f"{step}() was called before {STEPS[self.next_step]}(); the order is {', '.join(STEPS)}."
            )


class _Receive(torch.autograd.Function):
    """From the slot to the caller's rows."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, arrival: _Arrival, flight: Flight) -> tuple[Tensor, Tensor]:
        exchange, (received, where, turns) = flight.exchange, arrival
        slot, programs = flight.rows(flight.round, whole=exchange.fp8)
        source = flight.keep_rows(received, slot, programs) if exchange.fp8 else exchange.slots.rows
        rows = gather_sum.gather_rows(
            source, where.order, where.offsets, exchange.top_k, None if exchange.fp8 else slot
        )
        flight.landed()
        dispatch.release(flight.round)
        ctx.flight = flight
        ctx.save_for_backward(where.places, turns)
        ctx.set_materialize_grads(False)
        return rows, torch.empty_like(token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, token: Tensor | None) -> tuple[Tensor, None, None]:
        if token is None:
            raise RuntimeError(
                "Gradients of dispatched rows travel with those of their round's combine_wait(), which got none; let "
                "its result take part in what backward() starts from."
            )
        flight: Flight = ctx.flight
        exchange, round_ = flight.exchange, flight.gradient_round
        places, turns = ctx.saved_tensors
        if gradient is None:  # this rank's experts made nothing of its rows; others wait for word of it all the same
            shape = exchange.slots.shape
            gradient = torch.zeros(exchange.capacity, shape.hidden_size, dtype=shape.dtype, device=places.device)
        gradient = aligned(gradient)
        with exchange.beside():
            combine.push_sums(round_, gradient, places, None, turns, exchange.top_k)
            combine.announce_sent(round_)
        flight.leaving, flight.mark = (*flight.leaving, gradient, places, turns), exchange.mark()
        flight.check()
        return torch.empty_like(token), None, None


class _Return(torch.autograd.Function):
    """From the caller's outputs to the owners of the tokens, weighted and summed."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, outputs: Tensor, arrival: _Arrival, flight: Flight) -> Tensor:
        (_, weights), where, turns = arrival
        flight.send_sums(flight.round, outputs, where.places, weights, turns)
        if is_recomputing():
            flight.combined, _ = flight.finish(None)  # as in expert_parallel: nobody else may end the round
        ctx.flight = flight
        ctx.save_for_backward(outputs, weights, where.order, where.offsets, where.places)
        return torch.empty_like(token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        flight: Flight = ctx.flight
        exchange, round_ = flight.exchange, flight.gradient_round
        outputs, weights, order, offsets, places = ctx.saved_tensors
        gradient, products = gather_sum.gather_weighted_rows(
            SlotRows(round_), exchange.slots.rows, order, offsets, weights, outputs
        )
        flight.landed()
        dispatch.release(round_)
        token_gradient = None
        if ctx.needs_input_grad[0]:
            with exchange.beside():
                combine.wait_to_send(round_)
                combine.push_weight_gradients(round_, products, places)
            flight.leaving, flight.mark = (products, places), exchange.mark()
            token_gradient = torch.empty_like(token)
        else:
            # Nobody waits for these gradients: neither the hidden states nor the router needs one, on any rank.
            combine.release(round_)
            exchange.slots.close_round(flight.gradient_ticket)
        flight.check()
        return token_gradient, gradient if ctx.needs_input_grad[1] else None, None, None


def dispatch_send(exchange: TokenExchange, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Handle:
    """Open a round and launch the dispatch of this rank's tokens to the ranks of their experts; returns at once.

    hidden_states: [T, H] of the exchange's dtype, T from 0 to ``max_tokens`` and each rank's own.
    top_k_index: [T, K] integers, ids from 0 to ``num_experts`` - 1 that differ within a token, -1 for not routed.
    top_k_weights: [T, K] floating point, by which combine weights the experts' outputs.
    Every rank opens the same rounds and takes their steps in the same order; whether a gradient is needed (of the two
    inputs here, and of the outputs) must be the same at every rank too.
    Raises RuntimeError before ``setup`` and with ``depth`` rounds in flight, TypeError for a wrong dtype, UsageError
    for a wrong shape or device, too many tokens and, on CPU, ids out of range, which a GPU finds itself: a later call
    reports them. PeerTimeout from this and the other three calls names a lost peer.
    """
    inner = exchange._exchange
    if inner is None:
        raise RuntimeError("The exchange is not set up; call setup() on every rank before the first dispatch_send().")
    check_hidden_states(hidden_states, exchange.slot_shape.hidden_size, inner.slots.rows)
    check_tokens(hidden_states.shape[0], exchange.slot_shape.max_tokens)
    check_routing(hidden_states.shape[0], top_k_index, top_k_weights, exchange.ep.device, inner.top_k)
    ids = to_global_ids(top_k_index, exchange.num_experts)
    return Handle(inner, aligned(hidden_states), aligned(ids), aligned(top_k_weights.float()))


def dispatch_wait(handle: Handle) -> ReceivedRows:
    """Wait, on the device, for what all ranks sent to the experts of this one, and sort it by expert.

    Raises RuntimeError when called twice, UsageError for more than ``max_pairs`` rows.
    """
    handle.check_step("dispatch_wait")
    rows = handle.receive()
    handle.next_step += 1
    return rows


def combine_send(handle: Handle, outputs: Tensor) -> None:
    """Weight and sum the experts' outputs of each token and launch the sums to its rank; returns at once.

    outputs: [C, H] of the exchange's dtype, in the order of ``ReceivedRows.rows``, not weighted yet; they must not be
        changed before ``combine_wait``.
    Raises RuntimeError out of turn, TypeError for a wrong dtype, UsageError for a wrong shape or device.
    """
    handle.check_step("combine_send")
    exchange = handle.flight.exchange
    rows = exchange.slots.rows
    check_tensor("Outputs", outputs, (exchange.capacity, rows.shape[1]), rows, "the exchange")
    handle.send(aligned(outputs))
    handle.next_step += 1


@overload
def combine_wait(
    handle: Handle, shared: Tensor | None = None, residual: Tensor | None = None, norm_weight: None = None,
    norm_epsilon: float = ...,
) -> Tensor: ...  # fmt: skip


@overload
def combine_wait(
    handle: Handle, shared: Tensor | None = None, residual: Tensor | None = None, *, norm_weight: Tensor,
    norm_epsilon: float = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def combine_wait(
    handle: Handle,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_epsilon: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """Wait, on the device, for the sums of this rank's tokens and end the round: [T, H].

    shared, residual: [T, H] of the exchange's dtype, added in the same kernel, in that order.
    norm_weight: [H] of the RMSNorm that comes next, of the exchange's dtype. With it the result is a pair, the sum and
        the same normed, in the same kernel; for inference alone. norm_epsilon: of that norm.
    Raises RuntimeError out of turn and for a norm where a gradient is needed, TypeError for a wrong dtype, UsageError
    for a wrong shape or device.
    """
    handle.check_step("combine_wait")
    rows = handle.flight.exchange.slots.rows
    for name, extra in (("The shared output", shared), ("The residual", residual)):
        if extra is not None:
            check_tensor(name, extra, (handle.tokens, rows.shape[1]), rows, "the exchange")
    if norm_weight is not None:
        check_tensor("The norm's weight", norm_weight, rows.shape[1:], rows, "the exchange")
        if is_recomputing() or handle.requires_grad(shared, residual, norm_weight):
            raise RuntimeError(
                "combine_wait() was given a norm where a gradient is needed, and its norm has none; apply the norm "
                "after it, or call it under torch.no_grad()."
            )
    shared, residual, norm_weight = (
        None if each is None else aligned(each) for each in (shared, residual, norm_weight)
    )
    result, normed = handle.finish(shared, residual, norm_weight, norm_epsilon)
    handle.next_step += 1
    return result if normed is None else (result, normed)
