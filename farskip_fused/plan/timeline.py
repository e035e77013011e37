"""A stack of layers run by its schedule with given durations: one compute stream, one link. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from farskip_fused.connectivity import Connectivity
from farskip_fused.plan.durations import Durations
from farskip_fused.schedule import forward_order

COMPUTE, LINK = "compute", "link"


@dataclass(frozen=True)
class Interval:
    """What occupies a lane from ``start`` to ``end``, in ms."""

    lane: str
    name: str
    layer: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    intervals: list[Interval]
    layers: int

    @property
    def layer_time(self) -> float:
        """Milliseconds from one middle layer to the next, where neither end of the stack shows."""
        middle = self.layers // 2
        return self._start(middle + 1) - self._start(middle)

    def _start(self, layer: int) -> float:
        return min(one.start for one in self.intervals if one.lane == COMPUTE and one.layer == layer)

    def of_layer(self, layer: int) -> list[Interval]:
        return [one for one in self.intervals if one.layer == layer]


def simulate(connectivity: Connectivity, durations: Durations, layers: int = 8) -> Timeline:
    """Run ``layers`` equal layers; an action starts when the stream is free and what it waits for has arrived.

    The link carries one transfer at a time, in the order of launch.
    """
    intervals: list[Interval] = []
    arrived: dict[tuple[str, int], float] = {}
    stream_free, link_free = 0.0, 0.0
    for layer in range(layers):
        for action in forward_order(connectivity):
            start = stream_free
            if action.waits_for is not None:
                transfer, offset = action.waits_for
                start = max(start, arrived.get((transfer, layer + offset), 0.0))
            stream_free = start + durations.actions[action.name]
            intervals.append(Interval(COMPUTE, action.name, layer, start, stream_free))
            if action.launches is not None:
                launched = max(stream_free, link_free)
                link_free = launched + durations.transfers[action.launches]
                arrived[action.launches, layer] = link_free
                intervals.append(Interval(LINK, action.launches, layer, launched, link_free))
    return Timeline(intervals, layers)
