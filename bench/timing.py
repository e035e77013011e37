"""Times on a GPU: calls in random rotation, so that clocks, heat and caches favour none of them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
CEILING_SIZE = 8192
COPIED_BYTES = 2**31


@dataclass(frozen=True)
class Timing:
    """Median of the repeats and half of the range between their quartiles, in ms."""

    ms: float
    spread_ms: float

    def over(self, calls: int) -> Timing:
        """That of one of so many equal calls."""
        return Timing(self.ms / calls, self.spread_ms / calls)


def summarise(times: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, (high - low) / 2)


def interleave(
    calls: Mapping[str, Call], *, budget_ms: float = 2000.0, warm_up: int = 3, fewest: int = 12, most: int = 60
) -> dict[str, Timing]:
    """Time every call by CUDA events, each round in another order.

    budget_ms: time for all rounds together, within ``fewest`` and ``most`` of them. Nothing waits for the device
    between calls, so the host runs ahead and a time holds what the device did, not how long launching took.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    torch.cuda.synchronize()
    order = list(calls)
    shuffle = random.Random(0).shuffle
    spent = sum(_elapsed(_enqueue(calls, order)).values())
    rounds = []
    for _ in range(min(most, max(fewest, int(budget_ms / max(spent, 1e-3))))):
        shuffle(order)
        rounds.append(_enqueue(calls, order))
    times = [_elapsed(events) for events in rounds]
    return {name: summarise([one[name] for one in times]) for name in calls}


def _enqueue(calls: Mapping[str, Call], order: Sequence[str]) -> dict[str, tuple[torch.cuda.Event, torch.cuda.Event]]:
    events = {name: (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for name in order}
    for name in order:
        start, end = events[name]
        start.record()
        calls[name]()
        end.record()
    return events


def _elapsed(events: Mapping[str, tuple[torch.cuda.Event, torch.cuda.Event]]) -> dict[str, float]:
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) for name, (start, end) in events.items()}


def capture(calls: Sequence[Call]) -> Call:
    """One CUDA graph of all calls; returns what replays it. Each call runs once before, to compile and choose."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def ceilings() -> dict[str, float]:
    """What this GPU does in this run: TFLOP/s of an 8192^3 matrix product, TB/s read and written by a device copy."""
    a, b = (torch.randn(CEILING_SIZE, CEILING_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    # Long enough to reach the clocks that the power limit leaves.
    times = interleave({"matmul": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}, warm_up=100)
    return {
        "tflops": 2 * CEILING_SIZE**3 / times["matmul"].ms * 1e-9,
        "terabytes": 2 * COPIED_BYTES / times["copy"].ms * 1e-9,
    }
