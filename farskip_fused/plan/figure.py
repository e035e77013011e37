"""The timeline of one layer, standard above what was asked for, and the frontier of splits, as PNG or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from farskip_fused.errors import UsageError
from farskip_fused.plan.job import Job
from farskip_fused.plan.prediction import timelines
from farskip_fused.plan.rendering import LOOKS, shown, title
from farskip_fused.plan.splits import Sweep, frontier
from farskip_fused.plan.timeline import COMPUTE, LINK, merged


def checked_path(path: Path, *suffixes: str) -> Path:
    """Refuses a file that cannot be written, before the work."""
    if path.suffix not in suffixes:
        raise UsageError(f"The file {path} must end in {' or '.join(suffixes)}.")
    if not path.parent.is_dir():
        raise UsageError(f"The directory of {path} does not exist; create it first.")
    return path


def new_figure(width: float, height: float):  # type: ignore[no-untyped-def]
    """A matplotlib figure that needs no display. Raises UsageError without matplotlib."""
    if find_spec("matplotlib") is None:
        raise UsageError("A figure needs matplotlib; run: pip install 'farskip-fused[demo]'.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw(path: Path, job: Job, splits: Sweep | None = None) -> None:
    """Write the forward timeline, two layers of the middle of a stack, the second one paler; below it the frontier,
    tokens a second over EP, if ``splits`` are given. Raises UsageError for a path that cannot be written."""
    checked_path(path, ".png", ".svg")
    figure = new_figure(11, 4.2 if splits is None else 6.6)
    rows = 2 if splits is None else 3
    panels = figure.subplots(rows, 1, height_ratios=[1, 1, 1.4][:rows])
    found, names = {name: timeline for name, (_, timeline) in timelines(job).items()}, []
    widest = max(found[name].layer_time for name in ("standard", "farskip"))
    for axes, name in zip(panels, ("standard", "farskip"), strict=False):
        timeline = found[name]
        origin, middle, intervals = shown(timeline)
        for one in merged(intervals):
            start = max(one.start - origin, 0.0)
            lane = (0.55 if one.lane == COMPUTE else 0.05, 0.4)
            bar, alpha = [(start, one.end - origin - start)], 1.0 if one.layer == middle else 0.35
            axes.broken_barh(bar, lane, color=LOOKS[one.name][1], alpha=alpha, edgecolor="white", linewidth=0.5)
            if one.name not in names and one.end - one.start > 0.005 * widest:
                names.append(one.name)
        axes.axvline(timeline.layer_time, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks([0.25, 0.75], [LINK, COMPUTE])
        axes.set(ylim=(0, 1), xlim=(0, 2.05 * widest))
        label = name if name == "standard" else job.connectivity
        axes.set_title(f"{label}: {timeline.layer_time:.2f} ms a layer, forward", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_xlabel("ms since the layer began (paler: the layers before and after)")
    add_legend(figure, names)
    if splits is not None:
        draw_frontier(panels[2], splits)
    figure.suptitle(f"{title(job)}\nsimulated", fontsize=9)
    figure.savefig(path, dpi=120)


def add_legend(figure, names: Sequence[str]) -> None:  # type: ignore[no-untyped-def]
    """The colours of actions and transfers, below all panels."""
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=LOOKS[name][1], label=name.replace("_", " ")) for name in names],
        loc="outside lower center", ncols=len(names), fontsize=8, frameon=False,
    )  # fmt: skip


def draw_frontier(axes, splits: Sweep) -> None:  # type: ignore[no-untyped-def]
    """Tokens a second and GPU over EP, the best TP of each."""
    connectivity = splits.predictions[0].job.connectivity
    for name, colour, label in (
        ("blocking", "#969696", "blocking"), ("standard", "#e6550d", "standard"), ("farskip", "#31a354", connectivity)
    ):  # fmt: skip
        points = frontier(splits.predictions, name)
        axes.plot([ep for ep, _ in points], [rate for _, rate in points], "o-", color=colour, label=label, markersize=4)
    axes.set_xscale("log", base=2)
    ticks = [ep for ep, _ in frontier(splits.predictions, "farskip")]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="expert-parallel ranks (best tensor parallelism of each)", ylabel="tokens/s a GPU")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
