"""The timeline of one layer, standard above FarSkip: what computes while what is in flight."""

from __future__ import annotations

from pathlib import Path

from farskip_fused.connectivity import Connectivity
from farskip_fused.plan.durations import Durations
from farskip_fused.plan.timeline import COMPUTE, LINK, simulate
from farskip_fused.schedule import ACTIONS, TRANSFERS

COLORS = {
    "attention_projections": "#9ecae1",
    "attention_core": "#4292c6",
    "finish_combine": "#525252",
    "start_dispatch": "#fdae6b",
    "experts": "#31a354",
    "shared_experts": "#a1d99b",
    "dispatch": "#e6550d",
    "combine": "#756bb1",
}


def draw(path: Path, durations: Durations, caption: str) -> None:
    """Write a PNG or SVG. Two layers of the middle of a stack are shown, the second one paler."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 1, sharex=True)
    times = {}
    for axes, name in zip(panels, ("standard", "farskip"), strict=True):
        timeline = simulate(Connectivity.named(name), durations)
        times[name] = timeline.layer_time
        first = timeline.layers // 2
        origin = min(one.start for one in timeline.of_layer(first) if one.lane == COMPUTE)
        for one in timeline.intervals:
            if first - 1 <= one.layer <= first + 1 and one.end > origin:
                start = max(one.start - origin, 0.0)
                lane = (0.55 if one.lane == COMPUTE else 0.05, 0.4)
                alpha = 1.0 if one.layer == first else 0.35
                bar = [(start, one.end - origin - start)]
                axes.broken_barh(bar, lane, color=COLORS[one.name], alpha=alpha, edgecolor="white", linewidth=0.5)
        axes.axvline(timeline.layer_time, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks([0.25, 0.75], [LINK, COMPUTE])
        axes.set_ylim(0, 1)
        axes.set_title(f"{name}: {timeline.layer_time:.2f} ms a layer", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_xlim(0, 2.05 * max(times.values()))
    panels[1].set_xlabel("ms since the layer began (paler: the layers before and after)")
    names = [action.name for action in ACTIONS if durations.actions[action.name] > 0] + list(TRANSFERS)
    figure.legend(
        handles=[Patch(color=COLORS[name], label=name.replace("_", " ")) for name in names],
        loc="outside lower center", ncols=len(names), fontsize=8, frameon=False,
    )  # fmt: skip
    figure.suptitle(caption, fontsize=9)
    figure.savefig(path, dpi=150)
