"""`python -m farskip_fused.bench.open_questions`: what the plan answers to the paper's open questions.

Prints a table for each question and draws its figure into docs/. ``--write FILE`` also replaces the tables between
their marks in FILE. All of it is simulated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from farskip_fused.bench.report import replace_between
from farskip_fused.errors import UsageError
from farskip_fused.plan import CLUSTERS, MODELS, Job
from farskip_fused.plan.durations import forward_durations
from farskip_fused.plan.figure import new_figure
from farskip_fused.plan.prediction import predict_once, window
from farskip_fused.plan.splits import sweep

MODELS_ASKED = ("deepseek-v2-lite", "qwen3-30b-a3b", "llama-4-scout", "qwen3-235b-a22b", "deepseek-v3")
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
FRONTIER_CLUSTERS = ("h200-ib400", "gb200-nvl72")
ROOMY = replace(CLUSTERS["h200-ib400"], capacity=1e6)  # where memory is not the question
ELEMENTWISE = "fused"  # as training frameworks run at this scale
PEAK = {"h200-ib400": 989, "gb200-nvl72": 2500}  # dense bfloat16 TFLOP/s, datasheets
COLOURS = ("#969696", "#e6550d", "#31a354", "#756bb1")


def _largest(model: str) -> int:
    """The largest power of two that divides the model's experts, at most 64."""
    return next(ep for ep in (64, 32, 16, 8) if MODELS[model].experts % ep == 0)


def depth(folder: Path) -> str:
    """When does depth 2 pay? Layer times over the ratio of communication to computation, by the network's rate."""
    lines = [
        "| model, EP | communication | window | computation | depth 1 | depth 2 | depth 3 | bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS_ASKED:
        job = Job(model, ROOMY, ep=_largest(model), elementwise=ELEMENTWISE)
        moved, room = window(job)
        times = [predict_once(replace(job, depth=at)).forward for at in (1, 2, 3)]
        cells = [f"{one.farskip:.2f}" for one in times]
        bound = max(times[0].compute, moved)
        limits = f"{moved:.2f} | {room:.2f} | {times[0].compute:.2f}"
        lines.append(f"| {model}, {job.ep} | {limits} | {' | '.join(cells)} | {bound:.2f} |")
    figure = new_figure(9, 3.4)
    for axes, model in zip(figure.subplots(1, 2), ("qwen3-30b-a3b", "deepseek-v3"), strict=True):
        base = Job(model, ROOMY, ep=64, elementwise=ELEMENTWISE)
        for at, colour in zip((0, 1, 2, 3), COLOURS, strict=True):
            points = []
            for step in range(40):
                # Everything that is not the network stays; what transfers and kernels take from each other is left out
                # to show the schedule alone.
                rate = 4 * 1.17**step
                cluster = replace(ROOMY, network=rate, link=8 * rate, collective_share=0.0, late=0.0)
                job = replace(base, cluster=cluster, depth=max(1, at), connectivity="farskip" if at else "standard")
                direction = predict_once(job).forward
                moved = sum(forward_durations(job).transfers.values())
                points.append((moved / direction.compute, direction.farskip / max(direction.compute, moved)))
            label = f"depth {at}" if at else "standard"
            axes.plot(*zip(*points, strict=True), color=colour, label=label)
        axes.set(title=f"{model}, EP 64, forward", xlabel="communication / computation of a layer", xlim=(0, 2.5))
        axes.set_ylabel("layer time / max of the two")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "open-questions-depth.png", dpi=110)
    return "\n".join(lines)


def attention_window(folder: Path) -> str:
    """What remains of the window with fused attention? The window with scores in memory, with FlashAttention, twice as
    fast, and with the fused transport, which adds the experts."""
    lines = [
        "| model, EP, sequence | communication | scores in memory | FlashAttention | twice as fast | fused transport |",
        "|---|---|---|---|---|---|",
    ]
    figure = new_figure(9, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, sequence in zip(panels, (4096, 16384), strict=True):
        places = range(len(MODELS_ASKED))
        bars: list[list[float]] = []
        for model in MODELS_ASKED:
            job = Job(model, ROOMY, ep=_largest(model), sequence=sequence, elementwise=ELEMENTWISE)
            moved, fused_kernel = window(job)
            faster = replace(job, cluster=replace(ROOMY, attention=2.0))
            # Scores in bfloat16: written, read and written by the softmax, read again, over all pairs of tokens.
            pairs = job.tokens * MODELS[model].attended(sequence) * MODELS[model].heads
            in_memory = fused_kernel + 4 * 2 * pairs / (ROOMY.memory * 1e9)
            rooms = [in_memory, fused_kernel, window(faster)[1], window(replace(job, transport="fused"))[1]]
            bars.append([room / moved for room in rooms])
            lines.append(
                f"| {model}, {job.ep}, {sequence} | {moved:.2f} | {' | '.join(f'{room:.2f}' for room in rooms)} |"
            )
        labels = ("scores in memory", "FlashAttention", "twice as fast", "fused transport")
        for at, (label, colour) in enumerate(zip(labels, COLOURS, strict=True)):
            axes.bar([x + 0.2 * at for x in places], [one[at] for one in bars], 0.2, color=colour, label=label)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_xticks([x + 0.3 for x in places], [name.replace("-", "-\n", 1) for name in MODELS_ASKED], fontsize=7)
        axes.set(title=f"sequence {sequence}, forward", ylim=(0, 6))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("window / communication")
    panels[1].legend(frameon=False, fontsize=8)
    figure.savefig(folder / "open-questions-window.png", dpi=110)
    return "\n".join(lines)


def frontier(folder: Path) -> str:
    """The best split of 8 to 1024 GPUs, training, without and with FarSkip, at the same tokens a GPU."""
    return _frontier(folder / "open-questions-frontier.png", {"elementwise": ELEMENTWISE})


def serving(folder: Path) -> str:
    """The same for decoding: 64 sequences a GPU, contexts of 4096 tokens, float8."""
    work = {"phase": "decode", "precision": "fp8", "batch": 64}
    return _frontier(folder / "open-questions-serving.png", work)


def _frontier(file: Path, work: dict[str, Any]) -> str:
    lines = [
        "| model | from GPUs | cluster | best blocking | best standard | best FarSkip | tokens/s a GPU | gain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    figure = new_figure(11, 4.8)
    panels = figure.subplots(2, len(MODELS_ASKED), sharex=True)
    for column, model in enumerate(MODELS_ASKED):
        for row, cluster in enumerate(FRONTIER_CLUSTERS):
            points: list[tuple[int, list[float]]] = []
            written = "", 1.0  # splits and rate of the last line; what hardly changes is left out
            for gpus in GPUS:
                try:
                    found = sweep({"model": model, "cluster": cluster, "ep": 1, "dp": gpus, **work})
                except UsageError:
                    continue
                best = {name: found.best(name) for name in ("blocking", "standard", "farskip")}
                rates = [one.tokens_per_second * one.step["farskip"] / one.step[name] for name, one in best.items()]
                points.append((gpus, rates))
                splits = " | ".join(f"EP {one.job.ep} TP {one.job.tp}" for one in best.values())
                if splits != written[0] or abs(rates[2] / written[1] - 1) > 0.05:
                    written = splits, rates[2]
                    lines.append(
                        f"| {model} | {gpus} | {cluster} | {splits} | {', '.join(f'{rate:,.0f}' for rate in rates)} |"
                        f" {rates[2] / rates[1]:.2f} |"
                    )
            axes = panels[row][column]
            for at, (label, colour) in enumerate(zip(("blocking", "standard", "FarSkip"), COLOURS, strict=False)):
                curve = [(gpus, rates[at] / 1e3) for gpus, rates in points]
                axes.plot(*zip(*curve, strict=True), "o-", color=colour, label=label, markersize=3)
            axes.set_xscale("log", base=2)
            axes.set_xticks(GPUS[::2], [str(gpus) for gpus in GPUS[::2]], fontsize=7)
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"{model}\n{cluster}" if row == 0 else cluster, fontsize=8)
            axes.tick_params(axis="y", labelsize=7)
    panels[0][0].legend(frameon=False, fontsize=7)
    panels[0][0].set_ylabel("1000 tokens/s a GPU", fontsize=8)
    panels[1][2].set_xlabel("GPUs (best EP x TP of each)", fontsize=8)
    figure.savefig(file, dpi=100)
    return "\n".join(lines)


def _active(model: str) -> float:
    """Parameters that a token meets, embedding left out."""
    sizes = MODELS[model]
    routed = sizes.moe_layers * (sizes.experts - sizes.top_k) * sizes.expert()
    return sizes.total() - routed - sizes.vocabulary * sizes.hidden


def trillion(folder: Path) -> str:
    """Where a model of 10^12 parameters on 4096 GPUs ends up: training, by EP, for each way to run it."""
    lines = [
        "| cluster | EP | communication | computation | blocking | standard | FarSkip | depth 3 | fused, FarSkip |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    model, gpus = "kimi-k2", 4096
    figure = new_figure(9, 3.4)
    for axes, cluster in zip(figure.subplots(1, 2), FRONTIER_CLUSTERS, strict=True):
        points: list[tuple[int, list[float]]] = []
        for ep in (8, 16, 32, 64, 128):
            try:
                job = Job(model, cluster, ep=ep, dp=gpus, elementwise=ELEMENTWISE)
            except UsageError:
                continue
            plain = predict_once(job)
            deep, fused = (predict_once(replace(job, **change)) for change in ({"depth": 3}, {"transport": "fused"}))
            steps = [*plain.step.values(), deep.step["farskip"], fused.step["farskip"]]
            flops = 6 * _active(model) * job.tokens * 1e-9  # of a GPU's tokens; over ms this is TFLOP/s
            shares = [flops / step / PEAK[cluster] for step in steps]
            points.append((ep, shares))
            moved, computed = (
                sum(getattr(one, what) for one in plain.directions) for what in ("communication", "compute")
            )
            cells = " | ".join(f"{step:.0f} ms ({share:.0%})" for step, share in zip(steps, shares, strict=True))
            lines.append(f"| {cluster} | {ep} | {moved:.2f} | {computed:.2f} | {cells} |")
        labels = ("blocking", "standard", "FarSkip", "FarSkip, depth 3", "FarSkip, fused")
        for at, label in enumerate(labels):
            axes.plot(
                [ep for ep, _ in points], [shares[at] for _, shares in points], "o-", markersize=4, label=label,
                color=(*COLOURS, "#3182bd")[at],
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks([ep for ep, _ in points], [str(ep) for ep, _ in points])
        axes.set(title=f"{model}, {gpus} x {cluster}", xlabel="EP", ylim=(0, None))
        axes.set_ylabel("share of peak (6 N FLOPs a token)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(folder / "open-questions-trillion.png", dpi=110)
    return "\n".join(lines)


QUESTIONS: dict[str, Callable[[Path], str]] = {
    "depth": depth, "window": attention_window, "frontier": frontier, "serving": serving, "trillion": trillion,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="*", default=list(QUESTIONS), metavar="QUESTION", help=", ".join(QUESTIONS))
    parser.add_argument("--figures", type=Path, default=Path("docs"), help="folder for the figures")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the tables between the marks in FILE")
    given = parser.parse_args(arguments)
    for name in given.questions:
        if name not in QUESTIONS:
            parser.error(f"unknown question {name!r}; use {', '.join(QUESTIONS)}")
        content = QUESTIONS[name](given.figures)
        print(f"\n{name}\n{content}")
        if given.write is not None:
            text = given.write.read_text(encoding="utf-8")
            marks = (f"<!-- {name} -->", f"<!-- end of {name} -->")
            given.write.write_text(replace_between(text, marks, content), encoding="utf-8")


if __name__ == "__main__":
    main()
