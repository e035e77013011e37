"""What conversion would gain: standard against FarSkip on one job, with a range and a recommendation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from farskip_fused.connectivity import Connectivity
from farskip_fused.errors import UsageError
from farskip_fused.plan.clusters import scaled
from farskip_fused.plan.durations import (
    Durations,
    backward_durations,
    forward_durations,
    outside_moe_layers,
    reduction,
)
from farskip_fused.plan.job import Job
from farskip_fused.plan.timeline import LAYERS, Timeline, compute_bound, simulate
from farskip_fused.schedule import Action, backward_order, forward_order, tensor_parallel_order

# Factors on the rates of computation and of links between which a gain's range is taken. Computation: twice the worst
# error over bench/results of what kernels.py says of our own kernels; slower, down to the share of the achievable rate
# that AMD calls typically attained over shapes of real models (ROCm blog on TAF, MI325X: 74 to 81 %). Links: DeepEP's
# published shares of a link's peak lie between 0.71 and 0.86.
COMPUTE_RANGE, LINK_RANGE = (0.74, 1.1), (0.8, 1.2)
WORTH = 1.03  # a judgement: for less, distillation and its loss in accuracy are not recommended
STANDARD = "standard"


@dataclass(frozen=True)
class Direction:
    """A pass through the MoE layers: ms a layer, and of the whole stack.

    blocking: standard connectivity, each transfer awaited where it is launched. standard: each awaited as late as
    standard connectivity allows. farskip: the connectivity asked for. compute: computation alone. idle: what the
    compute stream waits with the connectivity asked for; the rest of ``exposed`` is computation that transfers slow.
    """

    name: str
    blocking: float
    standard: float
    farskip: float
    compute: float
    idle: float
    stack_blocking: float
    stack_standard: float
    stack_farskip: float

    @property
    def communication(self) -> float:
        """ms of a layer that communication costs if nothing hides it."""
        return self.blocking - self.compute

    @property
    def in_flight_overlap(self) -> float | None:
        """Share of the time of transfers in which something computes, as a trace shows it; None without transfers.

        Higher than ``overlap``, which also counts the computation that transfers slow down."""
        return 1 - self.idle / self.communication if self.communication > 1e-9 else None

    @property
    def exposed(self) -> float:
        """ms of a layer by which the connectivity asked for is slower than its computation."""
        return self.farskip - self.compute

    @property
    def overlap(self) -> float | None:
        """Share of the communication that is hidden; None where there is none."""
        return 1 - self.exposed / self.communication if self.communication > 1e-9 else None


@dataclass(frozen=True)
class Prediction:
    """Of one job. ``forward`` and ``backward``: layers. step: ms of everything, by connectivity ("blocking" too).

    outside: ms of a step outside the MoE layers. low, high: range of ``gain``.
    """

    job: Job
    forward: Direction
    backward: Direction | None
    outside: float
    step: dict[str, float]
    low: float
    high: float

    @property
    def speedup(self) -> float:
        """Of a step over standard connectivity as frameworks run it: blocking."""
        return self.step["blocking"] / self.step["farskip"]

    @property
    def gain(self) -> float:
        """Of a step over standard connectivity with as much overlap as it allows: what conversion itself brings."""
        return self.step[STANDARD] / self.step["farskip"]

    @property
    def directions(self) -> list[Direction]:
        return [self.forward] + ([] if self.backward is None else [self.backward])

    @property
    def overlap(self) -> float | None:
        """Of both directions together."""
        communication = sum(one.communication for one in self.directions)
        if communication <= 1e-9:
            return None
        return 1 - sum(one.exposed for one in self.directions) / communication

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU, with the connectivity asked for."""
        return self.job.replica_tokens * self.job.replicas / self.job.gpus / self.step["farskip"] * 1e3

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        job = {key: value for key, value in asdict(self.job).items() if key not in ("model", "cluster")}
        directions = {
            one.name: {
                **asdict(one), "communication": one.communication, "exposed": one.exposed, "overlap": one.overlap
            }
            for one in self.directions
        }  # fmt: skip
        return {
            "job": {"model": self.job.sizes.name, "cluster": self.job.machines.name, "gpus": self.job.gpus, **job},
            "unit": "ms", "layer": directions, "outside_moe_layers": self.outside, "step": self.step,
            "speedup": self.speedup, "gain": self.gain, "gain_range": [self.low, self.high], "overlap": self.overlap,
            "tokens_per_second_per_gpu": self.tokens_per_second, "memory_gb": self.job.memory(),
            "recomputes": self.job.recomputes, "communication_and_window": window(self.job),
            "durations": {
                one.name: asdict(timelines(self.job, one.name == "backward")["farskip"][0]) for one in self.directions
            },
        }  # fmt: skip


def predict(job: Job) -> Prediction:
    """Simulate the job's layers under standard connectivity and the one asked for."""
    prediction = predict_once(job)
    gains = [prediction.gain, *(one.gain for one in corners(job))]
    return replace(prediction, low=min(gains), high=max(gains))


def corners(job: Job) -> list[Prediction]:
    """Of the job with rates of computation and links off as far as they may be: one, the other, and both apart."""
    (slow, fast), (narrow, wide) = COMPUTE_RANGE, LINK_RANGE
    rates = ((slow, 1.0), (fast, 1.0), (1.0, narrow), (1.0, wide), (slow, wide), (fast, narrow))
    return [predict_once(replace(job, cluster=scaled(job.machines, compute=c, links=links))) for c, links in rates]


def predict_once(job: Job) -> Prediction:
    """Like ``predict``, without a range."""
    forward, backward = _direction(job, False), _direction(job, True) if job.phase == "training" else None
    outside = outside_moe_layers(job)
    step = {}
    for name in ("blocking", STANDARD, "farskip"):
        stack = getattr(forward, f"stack_{name}")
        step[name] = outside + stack * (2 if job.recomputes else 1)
        if backward is not None:
            step[name] += getattr(backward, f"stack_{name}")
    return Prediction(job, forward, backward, outside, step, 1.0, 1.0)


def orders(job: Job, backward: bool) -> tuple[tuple[Action, ...], tuple[Action, ...]]:
    """The schedule's order of a layer's actions: standard, and as asked for."""
    standard, asked = Connectivity.standard(), replace(Connectivity.named(job.connectivity), depth=job.depth)
    if job.reduces:
        return tensor_parallel_order(standard), tensor_parallel_order(asked)
    order = backward_order if backward else forward_order
    return order(standard), order(asked)


def timelines(job: Job, backward: bool = False) -> dict[str, tuple[Durations, Timeline]]:
    """Durations and simulated stacks: "blocking", "standard" and "farskip" (the connectivity asked for).

    The fused transport sends results tile by tile or summed for each rank, whichever makes the stack faster; always
    summed where ranks lie on several nodes.
    """
    durations_of = backward_durations if backward else forward_durations
    both = job.transport == "fused" and not job.reduces and job.in_one_node
    forms = (True, False) if both else (False,)
    durations = [durations_of(job, early_combine=form) for form in forms]
    standard, asked = orders(job, backward)
    found = {}
    for name, order, blocking in (("blocking", standard, True), (STANDARD, standard, False), ("farskip", asked, False)):
        runs = [(one, simulate(order, one, backward=backward, blocking=blocking)) for one in durations]
        found[name] = min(runs, key=lambda run: _stack(job, run[1]))
    return found


def _stack(job: Job, timeline: Timeline) -> float:
    """ms of all the model's MoE layers, from a stack of ``LAYERS``."""
    return timeline.makespan + (job.sizes.moe_layers - LAYERS) * timeline.layer_time


def _direction(job: Job, backward: bool) -> Direction:
    found = timelines(job, backward)
    stacks = {name: _stack(job, timeline) for name, (_, timeline) in found.items()}
    times = {name: timeline.layer_time for name, (_, timeline) in found.items()}
    order = orders(job, backward)[0]
    return Direction(
        "backward" if backward else "forward",
        times["blocking"], times[STANDARD], times["farskip"],
        compute=min(compute_bound(order, durations) for durations, _ in found.values()), idle=found["farskip"][1].idle,
        stack_blocking=stacks["blocking"], stack_standard=stacks[STANDARD], stack_farskip=stacks["farskip"],
    )  # fmt: skip


def window(job: Job) -> tuple[float, float]:
    """ms of dispatch and combine (or all-reduces) of a layer's forward pass, and of the window that hides them.

    With whole collectives: the layer without experts and gate (arXiv 2511.11505). In tensor-parallel inference all of
    it; with the fused transport all but the gate.
    """
    actions = forward_durations(job).actions
    if job.reduces:
        return 2 * reduction(job), sum(actions.values())
    gate = actions["start_dispatch"] + actions["finish_combine"]
    experts = 0.0 if job.transport == "fused" else actions["experts"]
    moved = sum(forward_durations(job).transfers.values())
    return moved, sum(actions.values()) - gate - experts


def recommendation(prediction: Prediction) -> str:
    """Two sentences: whether to convert, and why or from where on."""
    job, gain = prediction.job, prediction.gain - 1
    if prediction.overlap is None:
        least = _least_expert_parallelism(job)
        where = f"; from EP {least} on it would be" if least else ""
        return (
            f"Not worth it: there is no communication to hide{where}. A step takes {prediction.step['farskip']:.1f} ms,"
            " all of it computation."
        )
    moved = sum(one.communication for one in prediction.directions)
    idle = sum(one.idle for one in prediction.directions)
    hidden = f"Of {moved:.2f} ms of communication a layer {prediction.overlap:.0%} are hidden"
    if idle > 0.05 * moved:
        hidden += f"; for {idle:.2f} ms computation still waits for the links"
    if prediction.low >= WORTH:
        return (
            f"Convert: a step gets {gain:.0%} faster ({prediction.low:.2f} to {prediction.high:.2f} times). {hidden}."
        )
    if prediction.high < WORTH:
        least = _least_expert_parallelism(job)
        where = f" below EP {least}" if least else f" at EP {job.ep}"
        return f"Not worth it{where}: a step gets {gain:.1%} faster. {hidden}."
    return (
        f"Measure first: a step gets {gain:.1%} faster, but {prediction.low:.2f} to {prediction.high:.2f} times are"
        f" possible. {hidden}."
    )


def _least_expert_parallelism(job: Job) -> int | None:
    """The smallest larger EP, on as many more GPUs as it needs, from which on conversion is recommended."""
    ep = job.ep * 2
    while ep <= job.sizes.experts:
        try:
            larger = replace(job, ep=ep, dp=max(job.replicas, -(-ep // job.tp)))
        except UsageError:
            return None
        if predict(larger).low >= WORTH:
            return ep
        ep *= 2
    return None
