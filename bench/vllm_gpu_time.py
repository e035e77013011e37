"""How long vLLM's GPUs are busy with a request, which no wait for the processor adds to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd import DeviceType


def busy_ms(spans: Iterable[tuple[float, float]]) -> float:
    """ms in which at least one of the spans, each a begin and an end in us, is under way."""
    busy, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        busy += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return busy / 1e3


class GpuTime:
    """What a worker of vLLM's also is (``worker_extension_cls``); vLLM's names are in the same class."""

    def farskip_begin_trace(self) -> None:
        # Without what the processor does, which would have to be read, too.
        gpu = [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else None
        self._farskip_trace = torch.profiler.profile(activities=gpu)
        self._farskip_trace.start()

    def farskip_busy_ms(self) -> float:
        """ms that this worker's GPU was busy with kernels and copies since the trace began, and ends it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._farskip_trace.stop()
        events = self._farskip_trace.events() or ()
        on_gpu = [each for each in events if each.device_type == DeviceType.CUDA and not each.is_user_annotation]
        return busy_ms((each.time_range.start, each.time_range.end) for each in on_gpu)
