"""A prediction or a sweep on one screen of a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from farskip_fused.plan.job import ELEMENTWISE, TRANSPORTS, Job
from farskip_fused.plan.prediction import Prediction, recommendation, timelines
from farskip_fused.plan.splits import Sweep
from farskip_fused.plan.timeline import COMPUTE, LINK, Interval, Timeline

# Letter and colour of what fills a lane; the figure and the page use the colours too.
LOOKS = {
    "attention_projections": ("P", "#9ecae1"),
    "attention_core": ("A", "#4292c6"),
    "finish_combine": ("+", "#969696"),
    "start_dispatch": ("g", "#fdae6b"),
    "gate": ("g", "#fdae6b"),
    "experts": ("E", "#31a354"),
    "shared_experts": ("S", "#a1d99b"),
    "dispatch": ("d", "#e6550d"),
    "combine": ("c", "#756bb1"),
    "attention_reduce": ("a", "#e6550d"),
    "expert_reduce": ("e", "#756bb1"),
    "attention_projections_backward": ("P", "#9ecae1"),
    "attention_core_backward": ("A", "#4292c6"),
    "start_combine_gradients": ("+", "#969696"),
    "finish_dispatch_gradients": ("g", "#fdae6b"),
    "experts_input_gradients": ("E", "#31a354"),
    "experts_weight_gradients": ("W", "#006d2c"),
    "shared_experts_backward": ("S", "#a1d99b"),
    "dispatch_gradients": ("d", "#e6550d"),
    "combine_gradients": ("c", "#756bb1"),
}
WIDTH = 62
MOST_SPLITS = 16  # rows of a sweep


def title(job: Job) -> str:
    """What was asked, on one line."""
    what = f"context {job.sequence}" if job.phase == "decode" else f"sequence {job.sequence}"
    depth = f", depth {job.depth}" if job.depth > 1 else ""
    skew = f", skew {job.skew:g}" if job.skew else ""
    return (
        f"{job.sizes.name} on {job.gpus} x {job.machines.name}: EP {job.ep}, TP {job.tp}, DP {job.dp},"
        f" {job.phase} in {job.precision}, {what}, batch {job.batch}{depth}{skew}"
    )


def ways(job: Job) -> tuple[str, str]:
    """How its communication and its elementwise operations run, a line each."""
    assert job.elementwise is not None
    return (
        f"transport {job.transport}: {TRANSPORTS[job.transport]}",
        f"elementwise operations {job.elementwise}: {ELEMENTWISE[job.elementwise]}",
    )


def shown(timeline: Timeline) -> tuple[float, int, list[Interval]]:
    """When a layer in the middle of a stack begins, which one, and what is in a lane during it and the next."""
    middle = len(timeline.turns) // 2
    origin, end = timeline.turns[middle], timeline.turns[middle + 2]
    intervals = [one for one in timeline.intervals if one.end > origin and one.start < end]
    return origin, next(one.layer for one in intervals if one.lane == COMPUTE and one.start >= origin), intervals


def lane_text(timeline: Timeline, lane: str, scale: float) -> Text:
    """One layer of a lane, a character each ``scale`` ms; idle is a dot."""
    origin, _, intervals = shown(timeline)
    text = Text()
    for at in range(round(timeline.layer_time / scale)):
        moment = origin + (at + 0.5) * scale
        name = next((one.name for one in intervals if one.lane == lane and one.start <= moment < one.end), None)
        letter, colour = LOOKS[name] if name else ("·", "bright_black")
        text.append(letter, style=colour)
    return text


def render(prediction: Prediction, console: Console | None = None) -> None:
    """Timelines, where time goes, layer times, and the recommendation."""
    console, job = console or Console(), prediction.job
    console.print(Text(title(job), style="bold"))
    for line in ways(job):
        console.print(line, highlight=False)
    for direction in prediction.directions:
        found = timelines(job, direction.name == "backward")
        scale = max(timeline.layer_time for _, timeline in found.values()) / WIDTH
        console.print(f"{direction.name}, one layer; a letter is {scale * 1e3:.0f} µs", highlight=False)
        for name, label in (("standard", "standard"), ("farskip", job.connectivity)):
            for lane in (COMPUTE, LINK):
                begin = f"{label if lane == COMPUTE else '':>14} {lane:>7} "
                console.print(Text(begin) + lane_text(found[name][1], lane, scale), soft_wrap=True)
    console.print(_actions(job))
    console.print(_layers(prediction))
    if job.recomputes:
        console.print("Activations do not fit: every step runs its forward passes again (counted).")
    step = prediction.step
    console.print(
        f"step: {step['blocking']:.1f} ms blocking, {step['standard']:.1f} standard, {step['farskip']:.1f}"
        f" {job.connectivity}; {prediction.tokens_per_second:,.0f} tokens/s a GPU\n"
        f"{prediction.speedup:.2f}x over blocking; conversion itself {prediction.gain:.2f}x"
        f" ({prediction.low:.2f} to {prediction.high:.2f})",
        highlight=False,
    )
    console.print(Text(recommendation(prediction), style="bold green"))


# An action's part in the backward pass; the experts have two.
_BACKWARD_NAMES = {
    "attention_projections": ("attention_projections_backward",),
    "attention_core": ("attention_core_backward",),
    "finish_combine": ("start_combine_gradients",),
    "start_dispatch": ("finish_dispatch_gradients",),
    "experts": ("experts_input_gradients", "experts_weight_gradients"),
    "shared_experts": ("shared_experts_backward",),
    "dispatch": ("dispatch_gradients",),
    "combine": ("combine_gradients",),
}


def _actions(job: Job) -> Table:
    table = Table("", "where a layer's time goes", "forward", box=None)
    forward, backward = timelines(job)["farskip"][0], None
    if job.phase == "training":
        table.add_column("backward")
        backward = timelines(job, backward=True)["farskip"][0]
    for name, time in {**forward.actions, **forward.transfers}.items():
        letter, colour = LOOKS[name]
        cells: list[str | Text] = [Text(letter, style=colour), name.replace("_", " "), f"{time:.3f} ms"]
        if backward is not None:
            times = {**backward.actions, **backward.transfers}
            cells.append(f"{sum(times[part] for part in _BACKWARD_NAMES[name]):.3f} ms")
        table.add_row(*cells)
    return table


def _layers(prediction: Prediction) -> Table:
    table = Table("", "blocking", "standard", prediction.job.connectivity, "computation", "overlap", box=None)
    for one in prediction.directions:
        overlap = "none to hide" if one.overlap is None else f"{one.overlap:.0%}"
        times = (one.blocking, one.standard, one.farskip, one.compute)
        table.add_row(f"{one.name}, ms a layer", *(f"{time:.3f}" for time in times), overlap)
    return table


def render_sweep(found: Sweep, console: Console | None = None) -> None:
    console, first = console or Console(), found.predictions[0].job
    console.print(
        Text(
            f"{first.sizes.name} on {first.gpus} x {first.machines.name}, {first.phase}: splits with the same"
            " tokens a GPU, fastest first; ms of a step, tokens/s of a GPU",
            style="bold",
        )
    )
    table = Table("EP", "TP", "DP", "batch", "blocking", "standard", first.connectivity, "gain", "range", "tokens/s")
    table.box = None
    for one in found.predictions[:MOST_SPLITS]:
        job = one.job
        table.add_row(
            *map(str, (job.ep, job.tp, job.dp, job.batch)),
            *(f"{one.step[name]:.1f}" for name in ("blocking", "standard", "farskip")),
            f"{one.gain:.2f}", f"{one.low:.2f}-{one.high:.2f}", f"{one.tokens_per_second:,.0f}",
        )  # fmt: skip
    console.print(table)
    for name in ("standard", "farskip"):
        job = found.best(name).job
        console.print(f"best {name}: EP {job.ep}, TP {job.tp}, DP {job.dp}", highlight=False)
    if found.refused:
        (ep, tp), why = next(iter(found.refused.items()))
        console.print(
            f"{len(found.refused)} other splits are not possible, such as EP {ep} with TP {tp}: {why}", highlight=False
        )
