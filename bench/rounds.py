"""Rounds of dispatch and combine as benchmarks launch and time them, on each rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from farskip_fused.bench.collectives import time_call
from farskip_fused.flight import Exchange
from farskip_fused.kernels import combine, dispatch
from farskip_fused.kernels.dispatch import Received, SendOrder
from farskip_fused.kernels.layout import Layout
from farskip_fused.kernels.protocol import ROUTING_ARRIVAL, Round, announce, wait_arrival
from farskip_fused.symmetric.interface import join


def in_round(exchange: Exchange, step: Callable[[Round], Any]) -> Any:
    """A round of one step, whose slots are released whether the step used them or not; returns what the step does."""
    ticket, round_ = exchange.open_round()
    result = step(round_)
    dispatch.release(round_)
    combine.release(round_)
    exchange.slots.close_round(ticket)
    return result


def align(round_: Round) -> None:
    """No rank goes on before all are here."""
    announce(round_, ROUTING_ARRIVAL)
    wait_arrival(round_, ROUTING_ARRIVAL)


def dispatch_with_routing(
    exchange: Exchange, round_: Round, rows: Tensor, index: Tensor, weights: Tensor
) -> tuple[SendOrder, Received, Layout]:
    """Dispatch from ids and weights to rows that have all arrived; what is received is sorted while rows leave."""
    local, shape = exchange.num_local_experts, exchange.slots.shape
    with exchange.beside():
        dispatch.wait_to_send(round_)
        order = dispatch.send_routing(round_, index, weights, local)
        dispatch.send_rows(round_, rows, order, local)
    sent = exchange.mark()
    received, where = dispatch.receive_routing(
        round_, shape.max_tokens, shape.top_k, local, exchange.capacity, exchange.tile_rows
    )
    join(sent)
    dispatch.wait_rows(round_)
    return order, received, where


def time_launches(
    exchange: Exchange, launch: Callable[[], Any], iterations: int, stream: torch.cuda.Stream | None = None
) -> list[float]:
    """ms of ``launch`` in each iteration, which all ranks begin together: replays of a CUDA graph between events, on
    CPU calls by the clock.

    launch: opens and closes its own rounds; every kernel of it is loaded. stream: where it is captured.
    """
    memory = exchange.slots.memory
    if memory.device.type != "cuda":
        return time_call(memory.barrier, launch, iterations, memory.device, captured=False)
    replays = []
    for each in (partial(in_round, exchange, align), launch):
        memory.synchronize()
        memory.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            each()
        replays.append(graph.replay)
    start, measured = replays
    times = time_call(start, measured, iterations, memory.device, captured=True)
    memory.check()
    return times
