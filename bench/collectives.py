"""Collectives of other libraries, and ours beside them, called, captured and timed on each rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from farskip_fused.launch import RankFailed, run_ranks

LIMIT = 120.0  # seconds for all cases of one of them
HEAD_START = 2_000_000  # cycles that the GPU is held, so that the host is ahead of it
Result = TypeVar("Result")


class Refused(Exception):
    """A peer cannot be timed here; raised on all ranks, with the same reason."""


def together(action: Callable[[], Result]) -> Result:
    """What the action returns if it succeeds on all ranks; otherwise Refused on all."""
    result, reason = None, None
    try:
        result = action()
    except Exception as error:  # a library that is not made for this machine raises anything
        reason = first_line(error)
    reasons: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    for one in reasons:
        if one is not None:
            raise Refused(one)
    return result  # type: ignore[return-value]


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def run_others(measure: Callable[..., Any], world: int, *arguments: Any) -> list[Any] | str:
    """What ``measure`` of another library returns on each of so many ranks, a GPU each; or why it is not timed."""
    try:
        outcomes = run_ranks(measure, world, *arguments, device="cuda", limit=LIMIT, symmetric=False)
    except RankFailed as error:
        return f"it failed: {first_line(error)}"
    return outcomes[0] if isinstance(outcomes[0], str) else outcomes


def capture(calls: list[Callable[[], None]], device: torch.device) -> tuple[list[Callable[[], None]], bool]:
    """What replays each call as a CUDA graph, and True; the calls and False where any rank cannot capture them."""
    if device.type != "cuda":
        return calls, False
    replays: list[Callable[[], None]] = []

    def capture() -> None:
        for call in calls:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Threads of NCCL's go on asking for their events meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                call()
            replays.append(graph.replay)

    try:
        together(capture)
    except Refused:
        torch.cuda.synchronize()
        return calls, False
    return replays, True


def time_call(
    align: Callable[[], None], step: Callable[[], None], iterations: int, device: torch.device, captured: bool
) -> list[float]:
    """ms of the step in each iteration, which all ranks begin together; on CPU by the clock."""
    if device.type != "cuda":
        times = []
        for _ in range(iterations):
            align()
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e3)
        return times
    torch.cuda.synchronize()
    dist.barrier()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(iterations)]
    for start_event, end_event in events:
        if not captured:
            torch.cuda._sleep(HEAD_START)
        align()
        start_event.record()
        step()
        end_event.record()
    torch.cuda.synchronize()
    return [start_event.elapsed_time(end_event) for start_event, end_event in events]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
