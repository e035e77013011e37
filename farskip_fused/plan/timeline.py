"""A stack of layers run by its schedule with given durations: one compute stream, one link. Free of torch.

Transfers go over the link one at a time in the order of their launch. One that is launched before an action whose first
kernel holds every SM starts behind that kernel. While one is in flight, its SMs are missing from computation. Blocking
transfers stop the stream until they have arrived.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from farskip_fused.plan.durations import Durations
from farskip_fused.schedule import Action

COMPUTE, LINK = "compute", "link"
LAYERS = 14
SETTLED = 6  # layers after which a stack repeats itself: the deepest order fills in four
# Actions that fused kernels split into blocks, and the share of their first product, which runs on what has arrived
# (gate and up; through down). The rest produces what leaves.
FIRST_PRODUCT = {"experts": 2 / 3, "experts_input_gradients": 1 / 3}


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
    """intervals: in the order of launch. turns: when each layer's turn on the compute stream began, and the end."""

    intervals: list[Interval]
    turns: list[float]

    @property
    def layer_time(self) -> float:
        """Milliseconds of a layer in the middle of the stack, where neither end shows: a mean over several.

        The slower of stream and link: a stream may run ahead of its link for many layers before it has to wait.
        """
        arrivals: dict[int, float] = {}
        for one in self.of(LINK):
            arrivals[one.layer] = one.end
        paces = [self.turns, sorted(arrivals.values())] if len(arrivals) > SETTLED + 3 else [self.turns]
        return max((pace[-3] - pace[SETTLED]) / (len(pace) - 3 - SETTLED) for pace in paces)

    @property
    def idle(self) -> float:
        """Milliseconds of a layer that the compute stream waits, over the same layers."""
        begin, end = self.turns[SETTLED], self.turns[-3]
        working = sum(max(0.0, min(one.end, end) - max(one.start, begin)) for one in self.of(COMPUTE))
        return self.layer_time - working / (len(self.turns) - 3 - SETTLED) if end > begin else 0.0

    @property
    def makespan(self) -> float:
        """Milliseconds from the first action to the arrival of the last transfer."""
        return max((one.end for one in self.intervals), default=0.0)

    def of(self, lane: str) -> list[Interval]:
        return [one for one in self.intervals if one.lane == lane]


class _Run:
    def __init__(self, durations: Durations, blocking: bool) -> None:
        self.durations, self.blocking = durations, blocking
        self.intervals: list[Interval] = []
        self.arrived: dict[tuple[str, int, int], float] = {}
        self.stream = self.link = 0.0
        self.busy: list[tuple[float, float]] = []  # when the link is, in order, from where the stream is on
        self.launched: list[tuple[str, int, int]] = []  # and not started

    def wait(self, transfer: str, layer: int, piece: int) -> None:
        if (transfer, layer, piece) in self.launched:
            self.start_transfers()
        self.stream = max(self.stream, self.arrived.get((transfer, layer, piece), 0.0))

    def compute(self, name: str, layer: int, work: float) -> None:
        start = self.stream
        if self.launched:
            held = min(work, self.durations.held.get(name, 0.0))
            self._work(held)
            self.start_transfers()
            work -= held
        self._work(work)
        self.intervals.append(Interval(COMPUTE, name, layer, start, self.stream))

    def _work(self, work: float) -> None:
        now = self.stream
        rate = 1 - self.durations.contention
        while self.busy and self.busy[0][1] <= now:
            self.busy.pop(0)
        for begin, end in self.busy:
            if now + work <= begin:
                break
            work -= max(0.0, begin - now)
            now = max(now, begin)
            if now + work / rate <= end:
                now, work = now + work / rate, 0.0
                break
            work -= (end - now) * rate
            now = end
        self.stream = now + work

    def launch(self, transfer: str, layer: int, pieces: Sequence[int]) -> None:
        self.launched += [(transfer, layer, piece) for piece in pieces]
        if self.blocking:
            self.start_transfers()
            self.stream = max(self.stream, self.link)

    def start_transfers(self) -> None:
        """Of all that is launched, behind what is in flight."""
        for transfer, layer, piece in self.launched:
            time = self.durations.transfers[transfer] / self.durations.pieces
            start = max(self.stream, self.link)
            self.link = start + time
            self.arrived[transfer, layer, piece] = self.link
            if time > 0:
                self.intervals.append(Interval(LINK, transfer, layer, start, self.link))
                self.busy.append((start, self.link))
        self.launched = []


def simulate(
    order: Sequence[Action], durations: Durations, *, layers: int = LAYERS, backward: bool = False,
    blocking: bool = False,
) -> Timeline:  # fmt: skip
    """Run ``layers`` equal layers; an action starts when the stream is free and what it waits for has arrived.

    backward: layers from the last to the first, by an order of ``schedule.backward_order``. blocking: every transfer
    is awaited where it is launched, whole.
    """
    run, turns = _Run(durations, blocking), []
    for action in order if backward else ():
        if action.launches is not None and action.launches[1] < 0:
            # Nothing comes before the last layers' backward pass that could launch these.
            for layer in range(layers - 1, layers - 1 + action.launches[1], -1):
                run.launch(action.launches[0], layer, range(durations.pieces))
    run.start_transfers()
    for turn, layer in enumerate(_layers(layers, order, backward)):
        if turn < layers:
            turns.append(run.stream)
        for action in order:
            of = layer + action.layer
            if 0 <= of < layers:
                _act(run, action, of, layers)
    run.start_transfers()
    return Timeline(run.intervals, [*turns, run.stream])


def _layers(layers: int, order: Sequence[Action], backward: bool) -> Iterator[int]:
    """Turns: a layer each, and more where actions belong to a layer before the turn's."""
    beyond = max(-action.layer for action in order)
    return iter(range(layers - 1 + beyond, -1, -1) if backward else range(layers + beyond))


def _act(run: _Run, action: Action, layer: int, layers: int) -> None:
    durations = run.durations
    time, count = durations.actions[action.name], durations.pieces
    pieces = range(count)
    if count > 1 and action.name in FIRST_PRODUCT and not run.blocking:
        first = FIRST_PRODUCT[action.name] * time
        # Rows that need no transfer come first.
        run.compute(action.name, layer, first * durations.own)
        for piece in pieces:
            if action.waits_for is not None:
                run.wait(action.waits_for[0], layer + action.waits_for[1], piece)
            run.compute(action.name, layer, first * (1 - durations.own) / count)
        for piece in pieces:
            run.compute(action.name, layer, (time - first) / count)
            if action.launches is not None and durations.early_combine:
                run.launch(action.launches[0], layer, (piece,))
        if action.launches is not None and not durations.early_combine:
            run.launch(action.launches[0], layer, pieces)
        return
    if action.waits_for is not None:
        run.wait(action.waits_for[0], layer + action.waits_for[1], count - 1)
    run.compute(action.name, layer, time)
    if action.launches is not None and 0 <= layer + action.launches[1] < layers:
        run.launch(action.launches[0], layer + action.launches[1], pieces)


def compute_bound(order: Sequence[Action], durations: Durations) -> float:
    """Milliseconds of a layer's actions alone, with all SMs and nothing to wait for."""
    return sum(durations.actions[action.name] for action in order)


def merged(intervals: Sequence[Interval]) -> list[Interval]:
    """Neighbouring blocks of one action or transfer as one interval, for figures."""
    result: list[Interval] = []
    for one in intervals:
        last = result[-1] if result else None
        if last and (last.lane, last.name, last.layer) == (one.lane, one.name, one.layer) and last.end == one.start:
            result[-1] = Interval(one.lane, one.name, one.layer, last.start, one.end)
        else:
            result.append(one)
    return result
