"""`farskip bench layer`: decoder layers with attention, experts on several ranks, standard and blocking, FarSkip by
whole collectives, FarSkip fused; how much of the communication each of them hides, forward and with backward.

On one GPU the ranks run side by side under MPS, each with its share of the multiprocessors and, where a link is named,
with its share of that link, as in `farskip bench fused`: the scaled testbed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from farskip_fused.bench import fused, layer_trace
from farskip_fused.bench.attention import GroupedSizes, LatentSizes
from farskip_fused.bench.layer_ranks import DIRECTIONS, SHORT, Case, LayerShape, Measured, measure
from farskip_fused.bench.layer_ways import OVERLAPPED
from farskip_fused.bench.nccl_ways import NCCL_WAYS
from farskip_fused.bench.report import environment, open_console
from farskip_fused.bench.shapes import SHAPES as EXPERTS
from farskip_fused.bench.timing import summarise
from farskip_fused.errors import UsageError
from farskip_fused.launch import RankFailed, multiprocessors_of_rank, run_ranks
from farskip_fused.plan.figure import checked_path

SHAPES = {
    "deepseek-v2-lite": LayerShape(EXPERTS["deepseek-v2-lite"], LatentSizes(), 2 * 1408, normalise=False),
    "qwen3-30b-a3b": LayerShape(EXPERTS["qwen3-30b-a3b"], GroupedSizes(), 0, normalise=True),
}
RANKS, TOKENS, LAYERS, ITERATIONS = (4,), (4096,), 8, 20
LINKS = ("none", "nvlink4")
NETWORKS = {"ib400": 50.0, "ib200": 25.0}  # GB/s of a GPU in one direction; their peers are reached by puts
LONGEST_SEQUENCE = 4096
LARGEST_DIFFERENCE = 0.02  # of results and gradients; bfloat16 sums that are rounded once more differ by 0.003
LIMIT = 400.0
SLOW_LINK = 200.0  # GB/s of a GPU: over slower ones a rank sums a token's rows before they travel


def parse_link(text: str) -> tuple[float | None, bool]:
    """GB/s, None for as fast as stores go, and whether peers are reached by puts; UsageError for an unknown link."""
    if text in NETWORKS:
        return NETWORKS[text], True
    try:
        return fused.parse_link(text), False
    except UsageError:
        known = ", ".join((*fused.LINKS, *NETWORKS))
        raise UsageError(f"Unknown link {text!r}; use {known}, or GB/s such as 50.") from None


def run(
    shapes: Sequence[str],
    ranks: Sequence[int],
    links: Sequence[str],
    sms: Sequence[int | None],
    tokens: Sequence[int],
    *,
    layers: int = LAYERS,
    iterations: int = ITERATIONS,
    trace: Path | None = None,
    figure: Path | None = None,
) -> dict[str, Any]:
    """Measure every shape with each number of ranks, link, number of multiprocessors and of tokens a rank; bfloat16.

    sms: multiprocessors a rank that communication takes beside computation, None for the package's share.
    layers: of the stack; a layer's time is over all but ``SHORT`` of them.
    trace, figure: files for rank 0's profile and for one layer drawn from it, of a single case.
    Returns environment, failed (what raised, and what) and rows, one a direction. Raises UsageError for an unknown
    shape or link, for experts that do not divide over the ranks, tokens that do not divide into sequences, more
    multiprocessors than there are, a trace of several cases, and without a GPU.
    """
    rates = {name: parse_link(name) for name in links}
    for name in shapes:
        if name not in SHAPES:
            raise UsageError(f"Unknown layer {name!r}; use {', '.join(SHAPES)}.")
        for world in ranks:
            if SHAPES[name].experts.experts % world:
                experts = SHAPES[name].experts.experts
                raise UsageError(f"{name} has {experts} experts, which do not divide over {world} ranks.")
    for count in tokens:
        if count % min(count, LONGEST_SEQUENCE):
            raise UsageError(f"--tokens {count}: more than {LONGEST_SEQUENCE} must be sequences of {LONGEST_SEQUENCE}.")
    cases = [
        (name, world, link, Case(
            SHAPES[name], count, min(count, LONGEST_SEQUENCE), share, layers, _combine(*rate),
            nccl=rate == (None, False) and world <= torch.cuda.device_count(),
        ))
        for world in ranks for link, rate in rates.items() for name in shapes for count in tokens for share in sms
    ]  # fmt: skip
    if trace is not None:
        checked_path(trace, ".json")
    if figure is not None:
        checked_path(figure, ".png", ".svg")
    if (trace or figure) and len(cases) > 1:
        raise UsageError(
            f"A trace shows one case and {len(cases)} were asked for; name one shape, --link and --tokens."
        )
    if not torch.cuda.is_available():
        raise UsageError("farskip bench layer measures a CUDA GPU and this machine has none.")
    for world in ranks:
        available = multiprocessors_of_rank(world)
        for wanted in sms:
            if wanted is not None and wanted >= available:
                raise UsageError(f"--sms {wanted}: {world} ranks have {available} each; leave computation some.")
    gpus, console = torch.cuda.device_count(), Console(stderr=True)
    report: dict[str, Any] = {"environment": environment(), "failed": {}, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        profile = trace or (Path(folder) / "trace.json" if figure else None)
        for name, world, link, case in cases:
            # A start of its own for each: slots keep their link, and none of their memory is given back.
            rate, by_put = rates[link]
            sharing = world if world > gpus else 1  # ranks that share a GPU
            own_rate = None if rate is None else max(int(rate * 1e3 / sharing), 1)  # bytes a microsecond
            title = f"{name}, {world} ranks, link {link}, T {case.tokens}"
            start = time.monotonic()
            try:
                measured = run_ranks(
                    measure, world, case, own_rate, iterations, None if profile is None else str(profile.absolute()),
                    device="cuda", limit=LIMIT, wait_timeout=60.0, by_put=by_put,
                )  # fmt: skip
            except RankFailed as error:
                report["failed"][title] = str(error)
                continue
            finally:
                console.print(f"{title}: {time.monotonic() - start:.0f} s", highlight=False)
            report["rows"] += summary(name, case, link, own_rate, measured)
            if figure is not None and profile is not None:
                intervals = layer_trace.read_intervals(profile)
                if not intervals:
                    report["failed"][title] = "the profiler saw no kernels, so there is nothing to draw"
                    continue
                where = f"{world} ranks of one GPU" if sharing > 1 else f"{world} GPUs"
                layer_trace.draw(
                    figure, intervals, f"{name}, {where}, link {link}, {case.tokens} tokens a rank, forward"
                )
    return report


def _combine(rate: float | None, by_put: bool) -> str:
    """The form of combine that suits the link."""
    return "presummed" if by_put or (rate is not None and rate < SLOW_LINK) else "direct"


def summary(
    name: str, case: Case, link: str, link_rate: int | None, measured: Sequence[Measured]
) -> list[dict[str, Any]]:
    """One row a direction; ms of a layer, of the slowest rank in each iteration.

    exposed: what a way takes beyond computation. overlap: the share of communication (blocking beyond computation) that
    is not exposed; None where blocking is no slower. overlap_of_all: the same against computation that has all
    multiprocessors, so that those which communication takes count as exposed.
    fits: whether collectives take no longer than the window. link_ms: what the link needs for a way's bytes.
    ratio: a way over the longer of computation and link.
    """
    rows = []
    for direction in DIRECTIONS:
        ways = measured[0].times[direction]
        times = {way: summarise(_layer_times(measured, direction, way, case.layers)) for way in ways}
        ms = {way: timing.ms for way, timing in times.items()}
        row: dict[str, Any] = {
            "shape": name, "ranks": len(measured), "tokens": case.tokens, "link": link,
            "link_gigabytes_per_second": None if link_rate is None else link_rate * 1e-3, "direction": direction,
            "layers": case.layers, "attention": measured[0].attention,
            "fused_combine": case.combine, "comm_sms": measured[0].comm_sms, "gemm_sms": measured[0].gemm_sms,
            **{f"{way}_ms": timing.ms for way, timing in times.items()},
            **{f"{way}_spread_ms": timing.spread_ms for way, timing in times.items()},
            "fits": ms["collectives"] <= ms["window"],
        }  # fmt: skip
        for way in OVERLAPPED:
            passes = 1 if direction == "forward" else 2
            sent = passes * max(one.sent[way] for one in measured)
            link_ms = None if link_rate is None else sent / link_rate * 1e-3
            row |= {
                f"{way}_bytes": sent, f"{way}_link_ms": link_ms,
                f"{way}_overlap": _overlap(ms, way, "computation"),
                f"{way}_overlap_of_all": _overlap(ms, way, "computation_all"),
                f"{way}_speedup": ms["blocking"] / ms[way],
                f"{way}_ratio": ms[way] / max(ms["computation"], link_ms or 0.0),
            }  # fmt: skip
        row["differences"] = {
            way: {what: max_of([one.differences[way][what] for one in measured]) for what in of}
            for way, of in measured[0].differences.items()
        }
        rows.append(row)
    return rows


def _layer_times(measured: Sequence[Measured], direction: str, way: str, layers: int) -> list[float]:
    """ms of a layer in each iteration."""
    long, short = (
        [max(each) for each in zip(*(one.times[direction][way][count] for one in measured), strict=True)]
        for count in (layers, SHORT)
    )
    return [(whole - less) / (layers - SHORT) for whole, less in zip(long, short, strict=True)]


def _overlap(ms: dict[str, float], way: str, computation: str) -> float | None:
    communication = ms["blocking"] - ms[computation]
    return None if communication <= 0 else 1 - (ms[way] - ms[computation]) / communication


def max_of(values: Sequence[float]) -> float:
    """The largest; what is no number counts as largest."""
    return float(torch.tensor(values).max())


def render(report: dict[str, Any]) -> None:
    console = open_console(report)
    console.print("ms of a layer. FarSkip by whole collectives on a stream / fused:")
    table = Table(
        "shape", "ranks", "T", "link GB/s", "SMs", "pass", "blocking", "computation", "on all SMs", "collectives",
        "window", "streams", "fused", "overlap", "of all", "blocking / it", "it / longer", "NCCL blocking, streams",
    )  # fmt: skip
    for row in report["rows"]:
        rate = row["link_gigabytes_per_second"]
        both = {
            key: " / ".join(
                "-" if (value := row[f"{way}_{key}"]) is None else template.format(value) for way in OVERLAPPED
            )
            for key, template in (
                ("overlap", "{:.0%}"), ("overlap_of_all", "{:.0%}"), ("speedup", "{:.2f}"), ("ratio", "{:.2f}"),
            )
        }  # fmt: skip
        table.add_row(
            row["shape"], str(row["ranks"]), str(row["tokens"]),
            row["link"] if rate is None else f"{row['link']} {rate:.0f}", f"{row['comm_sms']} + {row['gemm_sms']}",
            "f" if row["direction"] == "forward" else "f+b",
            _with_spread(row, "blocking"), _with_spread(row, "computation"),
            *(f"{row[f'{way}_ms']:.3f}" for way in ("computation_all", "collectives")),
            f"{row['window_ms']:.3f}{'' if row['fits'] else ', too short'}",
            *(_with_spread(row, way) for way in OVERLAPPED), *both.values(),
            ", ".join(_with_spread(row, way) for way in NCCL_WAYS if f"{way}_ms" in row),
        )  # fmt: skip
    console.print(table)
    for row in report["rows"]:
        for way, differences in row["differences"].items():
            for what, difference in differences.items():
                # Not at most: a difference that is no number is one, too.
                if not difference <= LARGEST_DIFFERENCE and row["direction"] == DIRECTIONS[0]:
                    console.print(
                        f"{row['shape']}, {row['ranks']} ranks, link {row['link']}, T {row['tokens']}, {way}, {what}: "
                        f"results or gradients differ by {difference:.3g} from those of the plain definition, so these "
                        "times are of no use.",
                    )  # fmt: skip


def _with_spread(row: dict[str, Any], way: str) -> str:
    return f"{row[f'{way}_ms']:.3f} ± {row[f'{way}_spread_ms']:.3f}"
