"""One round of rows between ranks and the steps of its flight, without a gradient.

Sending runs on a stream of its own with a share of the GPU's multiprocessors, the experts' GEMMs on the rest.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from farskip_fused.kernels import combine, dispatch
from farskip_fused.kernels.combine import Extras
from farskip_fused.kernels.dispatch import Received, SendOrder
from farskip_fused.kernels.layout import Layout
from farskip_fused.kernels.protocol import Round, SlotRows
from farskip_fused.symmetric.interface import Mark, join
from farskip_fused.symmetric.slots import Slots, Ticket


@dataclass(frozen=True)
class Exchange:
    """Between which ranks rows travel and how; the same for every round of a layer, and at every rank.

    tile_rows: rows of a GEMM's tile, for any number of tokens: loading another variant of a kernel while one waits for
    a peer would deadlock. capacity: entries that a rank's experts take. programs: multiprocessors that communication
    may take; gemm_programs: those that are left to GEMMs beside it. keep_received: backward finds the rows where
    forward copied them, instead of having them dispatched again. presummed: see ``kernels/combine.py``. fp8: rows
    travel as e4m3. staged: whether some peers are reached by puts, which raise no flag for a single row.
    """

    slots: Slots
    num_local_experts: int
    top_k: int
    tile_rows: int
    capacity: int
    programs: int
    gemm_programs: int
    keep_received: bool = True
    presummed: bool = False
    fp8: bool = False
    staged: bool = False

    def open_round(self) -> tuple[Ticket, Round]:
        ticket, memory = self.slots.open_round(), self.slots.memory
        paced = memory.link_rate is not None
        return ticket, Round(self.slots.context, ticket.words, memory.world, self.programs, paced, memory.puts)

    @property
    def all_programs(self) -> int:
        """Of GEMMs beside which nothing travels."""
        return self.programs + self.gemm_programs

    def beside(self) -> AbstractContextManager[None]:
        """See ``SymmetricMemory``; so ``mark``."""
        return self.slots.memory.beside()

    def mark(self) -> Mark | None:
        return self.slots.memory.mark(self.programs)


class Flight:
    """What the steps of one round share; small tensors only, the large ones are saved by autograd."""

    def __init__(self, exchange: Exchange, top_k_index: Tensor) -> None:
        self.exchange = exchange
        self.top_k_index = top_k_index
        self.held = True  # until it is sent, it takes no slot
        self.order: SendOrder | None = None
        self.combined: Tensor | None = None
        # Rows that leave must stay alive until they have left, which ``mark`` marks.
        self.leaving: tuple[Tensor, ...] = ()
        self.mark: Mark | None = None

    def send(self, hidden_states: Tensor, top_k_weights: Tensor) -> None:
        """Launch the dispatch of [T, H] with its routing."""
        exchange, local = self.exchange, self.exchange.num_local_experts
        self.held = False
        self.ticket, self.round = exchange.open_round()
        self.gradient_ticket, self.gradient_round = self.ticket, self.round  # those of the gradients, once they travel
        with exchange.beside():
            dispatch.wait_to_send(self.round)
            self.order = dispatch.send_routing(self.round, self.top_k_index, top_k_weights, local)
            dispatch.send_rows(self.round, hidden_states, self.order, local, fp8=exchange.fp8)
        self.leaving, self.mark = (hidden_states, top_k_weights), exchange.mark()

    def send_gradient(self, gradient: Tensor, hidden_states: Tensor | None) -> None:
        """Launch the dispatch of gradients [T, H] along the same layout; of the hidden states again where given."""
        exchange, local = self.exchange, self.exchange.num_local_experts
        assert self.order is not None
        self.gradient_ticket, self.gradient_round = exchange.open_round()
        with exchange.beside():
            dispatch.wait_to_send(self.gradient_round)
            dispatch.send_rows(self.gradient_round, gradient, self.order, local)
            if hidden_states is not None:
                dispatch.send_rows(self.gradient_round, hidden_states, self.order, local, plane=1)
        self.leaving = (gradient,) if hidden_states is None else (gradient, hidden_states)
        self.mark = exchange.mark()

    def receive(self) -> tuple[Received, Layout]:
        """Wait for the routing of all ranks and sort it."""
        exchange = self.exchange
        max_tokens = exchange.slots.shape.max_tokens
        return dispatch.receive_routing(
            self.round, max_tokens, exchange.top_k, exchange.num_local_experts, exchange.capacity, exchange.tile_rows
        )

    def rows(self, round_: Round, whole: bool = False) -> tuple[SlotRows, int]:
        """Those of a round for a GEMM, and its programs: it begins as rows come, on what communication leaves.

        whole: it needs all of them first, as all GEMMs do with ``staged``. It then begins once they are here and this
        rank's have left, and takes all multiprocessors unless a later round may be travelling.
        """
        slot = SlotRows(round_)
        if not whole and not self.exchange.staged:
            return slot, self.exchange.gemm_programs
        self.landed()
        return slot.wait(), self.programs_once_landed()

    def keep_rows(self, received: Received, slot: SlotRows, programs: int) -> Tensor:
        """Copy the rows out of the slot: on the communication stream, where ``mark`` then marks the copy, or, if all
        are there, on this stream and so many multiprocessors."""
        exchange, shape = self.exchange, self.exchange.slots.shape
        rows = self.round.world * shape.max_tokens
        kept = torch.empty(rows, shape.hidden_size, dtype=shape.dtype, device=self.round.context.device)
        if slot.arrived:
            dispatch.keep_rows(self.round._replace(programs=programs), received.experts, kept, fp8=exchange.fp8)
            return kept
        with exchange.beside():
            dispatch.wait_rows(self.round)
            dispatch.keep_rows(self.round, received.experts, kept)
        self.mark = exchange.mark()
        return kept

    def send_sums(
        self, round_: Round, values: Tensor, places: Tensor, weights: Tensor | None, turns: Tensor,
        weight_parts: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launch what experts made to the owners of the tokens, summed; for the tensors see ``combine.push_sums``.

        weight_parts: of the router weights' gradients, which travel along.
        """
        with self.exchange.beside():
            combine.wait_to_send(round_)
            if weight_parts is not None:
                combine.push_weight_gradients(round_, weight_parts, places)
            combine.push_sums(round_, values, places, weights, turns, self.exchange.top_k)
            combine.announce_sent(round_)
        read = (values, places, weights, turns, weight_parts)
        self.leaving, self.mark = tuple(each for each in read if each is not None), self.exchange.mark()

    def programs_once_landed(self) -> int:
        """Programs of a GEMM after ``landed``: all, unless a later round than this one may be travelling.

        Sums of an earlier one may be too; they leave sooner or later, and this GEMM waits for nothing.
        """
        exchange = self.exchange
        return exchange.all_programs if exchange.slots.is_newest(self.gradient_ticket) else exchange.gemm_programs

    def landed(self) -> None:
        """Let this stream wait until what leaves this rank has left and what it copies has been copied."""
        join(self.mark)
        self.leaving, self.mark = (), None

    def finish(self, weights: Tensor | None, extras: Extras | None = None) -> tuple[Tensor, Tensor | None]:
        """Wait for the round's results, sum them and end the round: [T, H], and the same normed or None.

        weights: [T, K] float32, of no use where the results come pre-summed.
        """
        exchange, shape = self.exchange, self.exchange.slots.shape
        self.landed()
        presummed_by = exchange.num_local_experts if exchange.presummed else 0
        results = combine.combine_wait(
            self.round, self.top_k_index, None if exchange.presummed else weights, shape.hidden_size, shape.dtype,
            presummed_by, extras,
        )  # fmt: skip
        combine.release(self.round)
        exchange.slots.close_round(self.ticket)
        return results

    def check(self) -> None:
        self.exchange.slots.memory.check()
