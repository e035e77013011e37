"""What every rank of `farskip bench comm` runs: steps of dispatch and combine, timed by CUDA events or by the clock."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from farskip_fused.bench.pull import dispatch_by_pull
from farskip_fused.bench.rounds import align, dispatch_with_routing, in_round, time_launches
from farskip_fused.bench.shapes import Shape, random_routing
from farskip_fused.exchange_setup import ExchangeOptions, set_up
from farskip_fused.flight import Exchange
from farskip_fused.kernels import combine, dispatch
from farskip_fused.kernels.dispatch import Received, SendOrder
from farskip_fused.kernels.layout import Layout
from farskip_fused.kernels.protocol import Round
from farskip_fused.symmetric import SymmetricMemory
from farskip_fused.symmetric.slots import SlotShape

# "combine" brings the experts' outputs, summed on their way; "combine of sums" what the caller has summed already, one
# row a token and rank, which is DeepEP's job.
STEPS = ("dispatch", "dispatch with routing", "dispatch by pull", "combine", "combine of sums")


@dataclass(frozen=True)
class Case:
    """tokens: of every rank. sms: multiprocessors a rank that communication takes."""

    shape: Shape
    tokens: int
    sms: int


@dataclass(frozen=True)
class Measured:
    """times: ms of each step in each iteration. rows: received by this rank, one a token and source, own included."""

    times: dict[str, list[float]]
    rows: int


def measure(memory: SymmetricMemory, cases: list[Case], iterations: int) -> list[Measured]:
    """Every case on this rank; all ranks begin an iteration together."""
    return [_measure(memory, case, iterations) for case in cases]


def _measure(memory: SymmetricMemory, case: Case, iterations: int) -> Measured:
    shape, device = case.shape, memory.device
    torch.manual_seed(1 + memory.rank)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = torch.randn(case.tokens, shape.hidden, device=device).to(dtype)
    index, weights = random_routing(shape, case.tokens, device)
    slots = SlotShape(case.tokens, shape.hidden, shape.top_k, dtype)
    options = ExchangeOptions(num_comm_sms=case.sms, combine="presummed")
    parts = _Parts(rows, index, weights)
    # Every step once on a world of one: no kernel is loaded while another waits for a peer.
    exchange = set_up(memory, slots, shape.experts, options, lambda small: parts.few().run_all(small))
    kept, values = parts.prepare(exchange)
    local = exchange.num_local_experts
    mine = range(memory.rank * local, (memory.rank + 1) * local)
    routed = torch.stack([torch.isin(ids, torch.tensor(mine)).any(1) for ids in memory.gather(index.cpu())])
    times = {}
    for step in STEPS:
        launch = partial(in_round, exchange, partial(parts.take, step, exchange, kept, values))
        times[step] = time_launches(exchange, launch, iterations)
    memory.synchronize()
    return Measured(times, int(routed.sum()))


class _Parts:
    """The steps, on one rank's rows and routing."""

    order: SendOrder
    received: Received
    where: Layout
    turns: Tensor
    own_rows: Tensor

    def __init__(self, rows: Tensor, index: Tensor, weights: Tensor) -> None:
        self.rows, self.index, self.weights = rows, index, weights

    def few(self) -> _Parts:
        return _Parts(self.rows[:4].clone(), self.index[:4].clone(), self.weights[:4].clone())

    def prepare(self, exchange: Exchange) -> tuple[Tensor, Tensor]:
        """One whole round: the order of sending, the layout and the turns that later rounds reuse."""

        def whole(round_: Round) -> None:
            self.order, self.received, self.where = dispatch_with_routing(
                exchange, round_, self.rows, self.index, self.weights
            )
            self.turns = combine.find_turns(round_, self.received.experts, exchange.num_local_experts)
            received_rows = self.received.experts.shape[0]
            self.own_rows = torch.arange(received_rows, dtype=torch.int32, device=self.rows.device)[:, None]

        kept = self.rows.new_empty(exchange.slots.memory.world * exchange.slots.shape.max_tokens, self.rows.shape[1])
        values = self.rows.new_zeros(exchange.capacity, self.rows.shape[1])
        in_round(exchange, whole)
        return kept, values

    def run_all(self, exchange: Exchange) -> None:
        self.index = torch.where(self.index < exchange.num_local_experts, self.index, -1)  # a world of one has no more
        kept, values = self.prepare(exchange)
        in_round(exchange, align)
        for step in STEPS:
            in_round(exchange, partial(self.take, step, exchange, kept, values))

    def take(self, step: str, exchange: Exchange, kept: Tensor, values: Tensor, round_: Round) -> None:
        local, shape = exchange.num_local_experts, exchange.slots.shape
        if step == "dispatch":
            dispatch.wait_to_send(round_)
            dispatch.send_rows(round_, self.rows, self.order, local)
            dispatch.wait_rows(round_)
        elif step == "dispatch with routing":
            dispatch_with_routing(exchange, round_, self.rows, self.index, self.weights)
        elif step == "dispatch by pull":
            dispatch_by_pull(round_, self.rows, self.received.experts, kept)
        else:
            combine.wait_to_send(round_)
            if step == "combine":
                combine.push_sums(round_, values, self.where.places, self.received.weights, self.turns, shape.top_k)
            else:
                combine.push_sums(round_, kept, self.own_rows, None, self.turns, shape.top_k)
            combine.announce_sent(round_)
            combine.combine_wait(round_, self.index, None, shape.hidden_size, shape.dtype, local)
