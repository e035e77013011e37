"""`farskip bench all-reduce`: all-reduces between ranks by size of the message, ours in one shot and two, and others'.

On one GPU the ranks run side by side under MPS, ours alone; the link between them is then the GPU's own memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from farskip_fused.all_reduce import ANY_MESSAGE, largest_in_one_shot
from farskip_fused.bench.all_reduce_ranks import ONE_SHOT, OTHERS, TWO_SHOTS, Case, Measured, measure, measure_other
from farskip_fused.bench.all_to_all import SHARED
from farskip_fused.bench.collectives import run_others
from farskip_fused.bench.report import environment, open_console
from farskip_fused.bench.shapes import BYTES
from farskip_fused.bench.timing import summarise
from farskip_fused.errors import UsageError
from farskip_fused.launch import multiprocessors_of_rank, run_ranks

RANKS, SMS, HIDDEN = (2, 4), (8, 20), (7168,)
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 2048, 8192)
ITERATIONS = 40
OURS = "ours"


def run(ranks: Sequence[int], sms: Sequence[int], hidden: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
    """Measure every message [tokens, hidden] in bfloat16 with each number of ranks and of multiprocessors a rank.

    Returns environment, missing (what was left out, and why), rows, and crossings: where two shots become faster than
    one. Raises UsageError without a GPU, and for more multiprocessors than there are.
    """
    if not torch.cuda.is_available():
        raise UsageError("farskip bench all-reduce measures a CUDA GPU and this machine has none.")
    for world in ranks:
        available = multiprocessors_of_rank(world)
        for share in sms:
            if share >= available:
                raise UsageError(f"--sms {share}: {world} ranks have {available} each; leave computation some.")
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    with Console(stderr=True).status("") as status:
        for world in ranks:
            cases = [Case(count, size, share) for size in hidden for count in tokens for share in sms]
            status.update(f"{world} ranks, ours")
            found = run_ranks(measure, world, cases, ITERATIONS, device="cuda", limit=300.0, wait_timeout=30.0)
            for case, *measured in zip(cases, *found, strict=True):
                rows += summary(case, measured)
            for name in OTHERS:
                if world > torch.cuda.device_count():
                    missing[f"{name}, {world} ranks"] = SHARED
                    continue
                status.update(f"{world} ranks, {name}")
                theirs = [Case(count, size, 0) for size in hidden for count in tokens]
                others = run_others(measure_other, world, name, theirs, ITERATIONS)
                if isinstance(others, str):
                    missing[f"{name}, {world} ranks"] = others
                    continue
                for case, *measured in zip(theirs, *others, strict=True):
                    rows += summary(case, measured, by=name)
    return {"environment": environment(), "missing": missing, "rows": rows, "crossings": crossings(rows)}


def summary(case: Case, measured: Sequence[Measured], by: str = OURS) -> list[dict[str, Any]]:
    """One row a form: the slowest rank of each iteration counts.

    gigabytes_per_second: what a rank has to send in two shots, 2 (W - 1) / W messages, over the time; of any form.
    """
    world, message = len(measured), case.tokens * case.hidden * BYTES
    rows = []
    for form in measured[0].times:
        timing = summarise([max(times) for times in zip(*(one.times[form] for one in measured), strict=True)])
        rows.append(
            {
                "ranks": world, "tokens": case.tokens, "hidden": case.hidden, "bytes": message,
                "sms": case.sms or None, "by": by, "form": form, "replayed": all(one.captured for one in measured),
                "ms": timing.ms, "spread_ms": timing.spread_ms,
                "gigabytes_per_second": 2 * (world - 1) / world * message / timing.ms * 1e-6,
            }
        )  # fmt: skip
    return rows


def crossings(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each number of ranks and of multiprocessors: the smallest message from which on our two shots are faster
    than one, of those timed in both forms, None if there is none; and the package's threshold."""
    times: dict[tuple[int, int], dict[int, dict[str, float]]] = {}
    for row in rows:
        if row["by"] == OURS:
            of_size = times.setdefault((row["ranks"], row["sms"]), {}).setdefault(row["bytes"], {})
            of_size[row["form"]] = row["ms"]
    found = []
    for (world, sms), by_size in times.items():
        faster = None
        for size in sorted((size for size, forms in by_size.items() if ONE_SHOT in forms), reverse=True):
            if by_size[size][TWO_SHOTS] >= by_size[size][ONE_SHOT]:
                break
            faster = size
        found.append(
            {
                "ranks": world, "sms": sms, "two_shots_faster_from_bytes": faster,
                "threshold_bytes": largest_in_one_shot(world),
            }
        )  # fmt: skip
    return found


def render(report: dict[str, Any]) -> None:
    console = open_console(report)
    table = Table("ranks", "T", "KiB", "SMs a rank", "by", "form", "µs", "± µs", "GB/s a rank", "ours is faster by")
    for row in report["rows"]:
        ratio = None if row["by"] == OURS else row["ms"] / fastest_of_ours(report["rows"], row)
        table.add_row(
            str(row["ranks"]), str(row["tokens"]), f"{row['bytes'] / 1024:.0f}", str(row["sms"] or "own choice"),
            row["by"] if row["replayed"] else f"{row['by']}, without a graph", row["form"],
            f"{1e3 * row['ms']:.1f}", f"{1e3 * row['spread_ms']:.1f}", f"{row['gigabytes_per_second']:.0f}",
            "" if ratio is None else f"{ratio:.2f}x",
        )  # fmt: skip
    console.print(table)
    for one in report["crossings"]:
        faster, threshold = one["two_shots_faster_from_bytes"], one["threshold_bytes"]
        console.print(
            f"{one['ranks']} ranks, {one['sms']} SMs: two shots are faster "
            + ("at no size that was timed in both forms" if faster is None else f"from {faster / 1024:.0f} KiB on")
            + "; by default one shot carries "
            + ("any message" if threshold == ANY_MESSAGE else f"up to {threshold / 1024:.0f} KiB"),
        )


def fastest_of_ours(rows: Sequence[dict[str, Any]], other: dict[str, Any]) -> float:
    """ms of the same message, in our faster form and with any number of multiprocessors."""
    return min(
        row["ms"] for row in rows
        if row["by"] == OURS and all(row[key] == other[key] for key in ("ranks", "tokens", "hidden"))
    )  # fmt: skip
