"""`python -m farskip_fused.bench.plan_accuracy`: what the plan predicts of measured layers, and of the figures that
arXiv 2511.11505 publishes.

No constant of the plan was chosen by these rows. ``--write FILE`` replaces the tables between marks in FILE. Layers:
what `farskip bench layer` wrote to ``bench/results/``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from farskip_fused.bench.report import replace_between
from farskip_fused.bench.result_files import find
from farskip_fused.plan import MODELS, Job, Model
from farskip_fused.plan.clusters import find_cluster, scaled
from farskip_fused.plan.prediction import Prediction, corners, orders, predict, predict_once, timelines
from farskip_fused.plan.timeline import simulate


@dataclass(frozen=True)
class Published:
    """A row of the paper. speedup: lowest and highest factor that it gives. overlap: as printed there."""

    what: str
    job: Job
    speedup: tuple[float, float]
    overlap: str
    assumption: str


def _prefill(model: str, sequence: int, batch: int = 16) -> Job:
    return Job(
        model, "mi300x-400", ep=8, tp=8, dp=1, phase="prefill", precision="fp8", batch=batch, sequence=sequence,
        transport="all-to-all",
    )  # fmt: skip


def _all_moe(model: str, layers: int, ep: int) -> Job:
    """The model cut to so many layers, all of them MoE layers."""
    return _megatron(replace(MODELS[model], layers=layers, moe_layers=layers), ep)


def _megatron(model: str | Model, ep: int, **options: Any) -> Job:
    return Job(model, "mi300x-400", ep=ep, transport="all-to-all", elementwise="fused", **options)


ALL_TO_ALL = "MI300X; Megatron's all-to-all, which sends a row for each expert, and its fused elementwise operations"
ONE_STEP = "one micro-batch an optimizer step"
SUMS = "MI300X; all-reduce over 8 ranks; TTFT is the prefill alone, without scheduler, tokenizer and sampling"
ROWS = (
    Published(
        "V2-Lite, training, EP 8, 8 x 4096",
        _megatron("deepseek-v2-lite", 8, batch=8),
        (1.11, 1.11), "88 / 89 %", f"{ALL_TO_ALL}; {ONE_STEP}",
    ),
    Published(
        "V3, 6 layers, training, EP 8, 1 x 4096",
        _all_moe("deepseek-v3", 6, 8), (1.04, 1.04), "93 / 84 %", f"{ALL_TO_ALL}; {ONE_STEP}; all 6 are MoE layers",
    ),
    Published(
        "the same, 3 of 6 layers dense",
        _megatron("deepseek-v3", 8, layers=6),
        (1.04, 1.04), "93 / 84 %", "as above, but its first 6 layers as they are",
    ),
    Published(
        "V3, 6 layers, training, EP 32, 400 Gb/s",
        _all_moe("deepseek-v3", 6, 32), (1.22, 1.22), "", "as EP 8; a row for each expert between nodes too",
    ),
    Published(
        "the same, 3 of 6 layers dense", _megatron("deepseek-v3", 32, layers=6), (1.22, 1.22), "", "as above"
    ),
    Published("Scout, TTFT, 16 x 512", _prefill("llama-4-scout", 512), (1.122, 1.185), "95 to 98 %", SUMS),
    Published("Scout, TTFT, 16 x 2048", _prefill("llama-4-scout", 2048), (1.122, 1.185), "95 to 98 %", SUMS),
    Published("V2 (235B), TTFT, 16 x 512", _prefill("deepseek-v2", 512), (1.082, 1.168), "", SUMS),
    Published("V2 (235B), TTFT, 16 x 2048", _prefill("deepseek-v2", 2048), (1.082, 1.168), "", SUMS),
    Published(
        "V3, TTFT, SGLang, 32 x 2048", _prefill("deepseek-v3", 2048, 32), (1.34, 1.34), "",
        f"{SUMS}; TP 8, float8"
    ),
    Published(
        "V3, decode, SGLang, 2 nodes, batch 1024",
        Job("deepseek-v3", "mi300x-400", ep=16, tp=16, dp=1, phase="decode", precision="fp8", batch=1024, sequence=256),
        (1.0, 9.9), "", "published as \"consistent gain\"; context 256",
    ),
)  # fmt: skip
MARKS = ("<!-- accuracy -->", "<!-- end of accuracy -->")
LAYER_MARKS = ("<!-- layers -->", "<!-- end of layers -->")
GIVEN = "by streams, collectives as measured"
CLUSTERS = {"NVIDIA H200": "h200-ib400", "NVIDIA H100 80GB HBM3": "h100-ib400"}


def slowdown(row: Published) -> float | None:
    """By how much computation would have to be slower than the plan says for the middle of the published speed-ups.

    A diagnosis, used nowhere in the plan; None where slower computation does not lead there.
    """
    wanted = sum(row.speedup) / 2

    def at(factor: float) -> float:
        return predict_once(replace(row.job, cluster=scaled(row.job.machines, compute=1 / factor))).speedup

    low, high = 1.0, 20.0
    if not at(high) < wanted < at(low):
        return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle) > wanted else (low, middle)
    return low


def _percent(prediction: Prediction) -> str:
    shares = [one.in_flight_overlap for one in prediction.directions]
    return " / ".join(f"{share:.0%}".replace("%", "") for share in shares if share is not None) + " %"


def table() -> str:
    """Markdown: published and predicted, and what each row assumes."""
    lines = [
        "| row | published | predicted | published overlap | predicted overlap | off by | computation slower by |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, row in enumerate(ROWS, start=1):
        prediction = predict(row.job)
        speedups = [prediction.speedup, *(one.speedup for one in corners(row.job))]
        low, high = row.speedup
        published = "a gain" if high > 9 else f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
        middle = (low + high) / 2
        off = "" if high > 9 else f"{prediction.speedup / middle - 1:+.0%}"
        needed = None if high > 9 else slowdown(row)
        predicted = f"{prediction.speedup:.2f} ({min(speedups):.2f} to {max(speedups):.2f})"
        slower = "" if needed is None else f"{needed:.1f} x"
        cells = (f"{number}. {row.what}", published, predicted, row.overlap, _percent(prediction), off, slower)
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"{number}. {row.what}: {row.assumption}." for number, row in enumerate(ROWS, start=1)]
    return "\n".join([*lines, "", "What each row assumes:", *notes])


def layers() -> Iterator[tuple[str, dict[str, tuple[float, float]]]]:
    """Each layer and pass measured on GPUs that the plan knows; of each way ms as measured and as predicted, with the
    SMs that communication had.

    GIVEN is the way by streams whose dispatch and combine take together what they were measured to take alone.
    """
    for _, _, report in find("layer-.*", several=True):
        if report["environment"]["gpu"] not in CLUSTERS:
            continue
        cluster = find_cluster(CLUSTERS[report["environment"]["gpu"]])
        collectives = {
            (row["shape"], row["tokens"], row["link"]): row["collectives_ms"]
            for row in report["rows"]
            if row["direction"] == "forward"
        }
        for row in report["rows"]:
            if row["link"] == "ib400":  # puts, whose rate the plan does not have
                continue
            rate, share = row["link_gigabytes_per_second"], row["comm_sms"] / (row["comm_sms"] + row["gemm_sms"])
            machines = replace(cluster, link=rate or cluster.link, collective_share=share, fused_share=share)
            sizes = replace(MODELS[row["shape"]], layers=row["layers"], moe_layers=row["layers"])
            sequence = min(row["tokens"], 4096)
            job = Job(
                sizes, machines, ep=row["ranks"], dp=row["ranks"], batch=row["tokens"] // sequence, sequence=sequence
            )
            streams, fused = (predict_once(replace(job, transport=way)).directions for way in ("streams", "fused"))
            forward = row["direction"] == "forward"
            passes = slice(1) if forward else slice(2)
            moved = [collectives[row["shape"], row["tokens"], row["link"]]]
            moved += [] if forward else [row["collectives_ms"] - moved[0]]
            predicted = {
                "blocking": sum(one.blocking for one in streams[passes]),
                "computation": sum(one.compute for one in streams[passes]),
                "by streams": sum(one.farskip for one in streams[passes]),
                GIVEN: _by_given_collectives(job, moved),
            }
            if row.get("fused_combine", "direct") == "direct" and rate is None:  # the plan's fused transport
                predicted["fused"] = sum(one.farskip for one in fused[passes])
            link = "NVLink" if rate is None else f"{rate:g} GB/s"
            where = f"{row['ranks']} GPUs, T {row['tokens']}, {link}"
            names = dict.fromkeys(("by streams", GIVEN), "paper")
            yield (
                f"{row['shape']}, {where}, {row['direction'].replace('_', ' and ')}",
                {way: (row[f"{names.get(way, way)}_ms"], ms) for way, ms in predicted.items()},
            )


def _by_given_collectives(job: Job, moved: Sequence[float]) -> float:
    """moved: ms of both transfers together, forward and perhaps backward."""
    ms = 0.0
    for both, backward in zip(moved, (False, True), strict=False):
        durations = timelines(job, backward)["farskip"][0]
        durations = replace(durations, transfers=dict.fromkeys(durations.transfers, both / 2))
        ms += simulate(orders(job, backward)[1], durations, backward=backward).layer_time
    return ms


def layer_table() -> str:
    """Markdown: layer times as measured and as predicted, the errors' median, and the speed-ups over blocking."""
    lines = ["| layer | measured, ms | predicted, ms | off by |", "|---|---|---|---|"]
    speedups = ["| speed-up over blocking | measured | predicted |", "|---|---|---|"]
    errors = []
    for what, ways in layers():
        for way, (measured, predicted) in ways.items():
            off = predicted / measured - 1
            errors += [] if way == GIVEN else [off]
            lines.append(f"| {what}, {way} | {measured:.2f} | {predicted:.2f} | {off:+.0%} |")
            if way in ("by streams", "fused"):
                cells = [f"{ways['blocking'][at] / ways[way][at]:.2f}" for at in (0, 1)]
                speedups.append(f"| {what}, {way} | {' | '.join(cells)} |")
    sizes = sorted(map(abs, errors))
    return "\n".join(
        [
            *lines,
            "",
            f"The median error of what is not given is {median(sizes):.0%}, the largest {sizes[-1]:.0%}.",
            "",
            *speedups,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table between the marks in FILE")
    file = parser.parse_args().write
    tables = {LAYER_MARKS: layer_table(), MARKS: table()}
    print(*tables.values(), sep="\n\n")
    if file is not None:
        text = file.read_text(encoding="utf-8")
        for marks, content in tables.items():
            text = replace_between(text, marks, content)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
