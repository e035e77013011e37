"""What ran when: a profile of a stack in each way, its kernels under the names of the schedule's actions, and a figure
of one layer of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, record_function

from farskip_fused.plan.figure import add_legend, new_figure
from farskip_fused.plan.rendering import LOOKS

if TYPE_CHECKING:
    from farskip_fused.bench.layer_ranks import Stack

TRACED = ("blocking", "paper", "fused")
TITLES = {
    "blocking": "standard connectivity, blocking",
    "paper": "FarSkip, whole collectives on a stream",
    "fused": "FarSkip, fused: results leave inside the experts' products",
}
HOLD_MICROSECONDS = 200_000  # for the host to launch a whole pass in: its pace would show otherwise


@dataclass(frozen=True)
class Interval:
    """A stretch of kernels of one action of one layer, ms from the start of its trace. transfer: on another stream than
    the layer's computation."""

    way: str
    layer: int
    action: str
    transfer: bool
    start: float
    end: float


class _Labels:
    """Puts the stack's methods under the names of actions, as methods of the objects that it holds."""

    def __init__(self, stack: Stack) -> None:
        self.pass_name = ""
        for number, (layer, moe) in enumerate(zip(stack.layers["farskip"], stack.moes, strict=True)):
            attention: Any = layer.attention
            self._label(layer.attention_norm, "forward", number, "attention_projections")
            self._label(attention, "project", number, "attention_projections")
            self._label(attention, "attend", number, "attention_core")
            self._label(layer.moe_norm, "forward", number, "start_dispatch")
            self._label(moe.gate, "forward", number, "start_dispatch")
            if layer.shared_experts is not None:
                self._label(layer.shared_experts, "forward", number, "shared_experts")
        stack.ways = {
            name: replace(way, pending=self._labelled(stack, way.pending)) for name, way in stack.ways.items()
        }

    def _label(self, of: Any, method: str, layer: int, action: str) -> None:
        function = getattr(of, method)

        def labelled(*arguments: Any, **options: Any) -> Any:
            with record_function(f"{self.pass_name}/{layer}/{action}"):
                return function(*arguments, **options)

        setattr(of, method, labelled)

    def _labelled(self, stack: Stack, make: Callable[..., Any]) -> Callable[..., Any]:
        """Rounds whose steps are labelled; layers make them in turn."""

        def labelled(*arguments: Any) -> Any:
            layer = next(number for number, moe in enumerate(stack.moes) if moe.w13 is arguments[-2])
            with record_function(f"{self.pass_name}/{layer}/start_dispatch"):
                pending = make(*arguments)
            self._label(pending, "experts", layer, "experts")
            self._label(pending, "finish", layer, "finish_combine")
            return pending

        return labelled


def profile(stack: Stack, path: str) -> None:
    """Write rank 0's Chrome trace of a pass in each way and direction; collective, and the stack's last act.

    Passes are launched one by one, not replayed: a replayed graph has no names. GPUs are held until all is launched.
    """
    from farskip_fused.bench.layer_ranks import DIRECTIONS

    memory, labels = stack.memory, _Labels(stack)
    on_gpu = memory.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profiler = torch.profiler.profile(activities=activities) if memory.rank == 0 else None
    if profiler is not None:
        profiler.start()
    with stack.on_stream():
        for direction in DIRECTIONS:
            for name in TRACED:
                labels.pass_name = f"{name} {direction}"
                memory.synchronize()
                memory.barrier()
                if on_gpu:
                    _hold()
                stack.align()
                stack.run(name, direction, stack.case.layers)
                memory.synchronize()
    memory.barrier()
    if profiler is not None:
        profiler.stop()
        profiler.export_chrome_trace(path)


def _hold() -> None:
    from farskip_fused import _C

    _C.hold(torch.cuda.current_stream().cuda_stream, 1, HOLD_MICROSECONDS)


def read_intervals(path: Path, category: str = "gpu_user_annotation") -> list[Interval]:
    """The labelled stretches of a trace's forward passes that ``profile`` wrote, in the order of time; none where the
    profiler saw no kernels.

    category: "user_annotation" for the host's calls in the place of the kernels that they launched.
    """
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    labelled = [
        (*event["name"].split("/"), event) for event in events
        if event.get("cat") == category and event["name"].count("/") == 2
    ]  # fmt: skip
    computing = {event["tid"] for *_, action, event in labelled if action == "attention_core"}
    found = []
    for passed, layer, action, event in labelled:
        way, _, direction = passed.partition(" ")
        if direction == "forward":
            start = event["ts"] * 1e-3
            transfer = event["tid"] not in computing
            found.append(Interval(way, int(layer), action, transfer, start, start + event["dur"] * 1e-3))
    return sorted(found, key=lambda one: one.start)


def draw(path: Path, intervals: Sequence[Interval], title: str) -> None:
    """One layer from the middle of the stack in each way, what neighbours do meanwhile paler; kernels on the layer's
    own stream above those on the communication stream."""
    ways = [way for way in TRACED if any(one.way == way for one in intervals)]
    figure, names = new_figure(11, 1.6 * len(ways) + 1.2), []
    panels = figure.subplots(len(ways), 1, squeeze=False)[:, 0]
    widest = max(end - start for start, end in (turn(intervals, way) for way in ways))
    for axes, way in zip(panels, ways, strict=True):
        start, end = turn(intervals, way)
        middle = middle_layer(intervals)
        for one in intervals:
            if one.way == way and one.end > start and one.start < start + 1.3 * widest:
                name = {"experts": "combine"}.get(one.action, "dispatch") if one.transfer else one.action
                left = max(one.start, start) - start
                axes.broken_barh(
                    [(left, one.end - start - left)], (0.05 if one.transfer else 0.55, 0.4), color=LOOKS[name][1],
                    alpha=1.0 if one.layer == middle else 0.35, edgecolor="white", linewidth=0.5,
                )  # fmt: skip
                if name not in names:
                    names.append(name)
        axes.axvline(end - start, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks([0.25, 0.75], ["communication", "computation"])
        axes.set(ylim=(0, 1), xlim=(0, 1.3 * widest))
        axes.set_title(f"{TITLES[way]}: {end - start:.2f} ms a layer", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("ms since the layer began (paler: the layers before and after)")
    add_legend(figure, names)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)


def middle_layer(intervals: Sequence[Interval]) -> int:
    return max(one.layer for one in intervals) // 2


def turn(intervals: Sequence[Interval], way: str) -> tuple[float, float]:
    """When attention of the middle layer and of the next one begins: a layer's time on its own stream."""
    first = [
        min(
            one.start for one in intervals
            if (one.way, one.layer, one.action, one.transfer) == (way, layer, "attention_projections", False)
        )
        for layer in (middle_layer(intervals), middle_layer(intervals) + 1)
    ]  # fmt: skip
    return first[0], first[1]
