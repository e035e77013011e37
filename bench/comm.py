"""`farskip bench comm`: dispatch and combine between ranks, ours by push, by pull, and others' (all_to_all.py).

On one GPU the ranks run side by side under MPS, each with its share of the multiprocessors: the link between them is
the GPU's own memory, so figures compare kernels, not networks. The others need a GPU a rank; DeepEP has marks of an
earlier run on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from farskip_fused.bench import all_to_all
from farskip_fused.bench.comm_ranks import Case, Measured, measure
from farskip_fused.bench.report import environment, open_console
from farskip_fused.bench.shapes import BYTES, parse_shape
from farskip_fused.bench.timing import summarise
from farskip_fused.errors import UsageError
from farskip_fused.launch import multiprocessors_of_rank, run_ranks

RANKS, SMS, TOKENS = (2, 4, 8), (20, 8), (4096, 128)
SHAPES = ("deepseek-v2-lite", "qwen3-30b-a3b")
ITERATIONS = 40
# ms of dispatch and combine of DeepEP v1.2.1's intranode kernels (cached layout, bf16, 4096 tokens a rank), measured
# with ranks side by side on one H100 under MPS. By hidden, experts, top-k, ranks and multiprocessors a rank.
DEEPEP = {
    (2048, 64, 6, 2, 20): (0.312, 0.238), (2048, 64, 6, 4, 20): (0.463, 0.411), (2048, 128, 8, 4, 20): (0.454, 0.477),
    (7168, 256, 8, 4, 20): (1.063, 1.223), (2048, 64, 6, 4, 8): (0.836, 0.737), (2048, 128, 8, 4, 8): (0.935, 0.797),
    (7168, 256, 8, 4, 8): (1.701, 1.921), (2048, 64, 6, 8, 16): (0.996, 1.016), (7168, 256, 8, 8, 16): (3.514, 3.043),
}  # fmt: skip
DEEPEP_TOKENS = 4096
OURS = "ours"


def run(shapes: Sequence[str], ranks: Sequence[int], sms: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
    """Measure every shape with each number of ranks, of multiprocessors a rank and of tokens a rank; bfloat16.

    Returns environment, missing (what was left out, and why) and rows. Raises UsageError for an unknown shape, for
    experts that do not divide over the ranks, and without a GPU.
    """
    parsed = {name: parse_shape(name) for name in shapes}
    for name, shape in parsed.items():
        for world in ranks:
            if shape.experts % world:
                raise UsageError(f"{name} has {shape.experts} experts, which do not divide over {world} ranks.")
    if not torch.cuda.is_available():
        raise UsageError("farskip bench comm measures a CUDA GPU and this machine has none.")
    reasons: dict[str, dict[str, list[int]]] = {}
    rows = []
    with Console(stderr=True).status("") as status:
        for world in ranks:
            shared = world > torch.cuda.device_count()
            available = multiprocessors_of_rank(world)
            cases = [
                (name, Case(shape, count, share))
                for name, shape in parsed.items()
                for count in tokens
                for share in sms
                if share < available
            ]
            status.update(f"{world} ranks, {len(cases)} cases")
            arguments = ([case for _, case in cases], ITERATIONS)
            found = run_ranks(measure, world, *arguments, device="cuda", limit=300.0, wait_timeout=30.0)
            for (name, case), *measured in zip(cases, *found, strict=True):
                rows += summary(name, case, world, measured, marked=shared)
            if shared:
                missing = all_to_all.missing_on_shared_gpu()
            else:
                status.update(f"{world} ranks, others' all-to-all")
                others, missing = all_to_all.compare(cases, world, ITERATIONS)
                for peer, name, case, measured, captured in others:
                    rows += summary(name, case, world, measured, by=peer, replayed=captured, marked=False)
            for peer, reason in missing.items():
                reasons.setdefault(peer, {}).setdefault(reason, []).append(world)
    return {"environment": environment(), "missing": _worded(reasons, len(ranks)), "rows": rows}


def _worded(reasons: dict[str, dict[str, list[int]]], runs: int) -> dict[str, str]:
    """Why each peer is missing; with which numbers of ranks, unless it is with all."""
    return {
        peer: "; ".join(
            reason if len(worlds) == runs else f"with {', '.join(map(str, worlds))} ranks {reason}"
            for reason, worlds in of_peer.items()
        )
        for peer, of_peer in reasons.items()
    }


def summary(
    name: str,
    case: Case,
    world: int,
    measured: Sequence[Measured],
    by: str = OURS,
    replayed: bool = True,
    marked: bool = True,
) -> list[dict[str, Any]]:
    """One row a step: the slowest rank of each iteration counts, and the rank that receives most.

    replayed: whether a CUDA graph was timed. marked: with DeepEP's marks where there are any.
    """
    received = max(one.rows for one in measured) * case.shape.hidden * BYTES
    marks = DEEPEP.get((case.shape.hidden, case.shape.experts, case.shape.top_k, world, case.sms)) if marked else None
    rows = []
    for step in measured[0].times:
        timing = summarise([max(times) for times in zip(*(one.times[step] for one in measured), strict=True)])
        mark = None
        if marks is not None and case.tokens == DEEPEP_TOKENS:
            mark = marks[step.startswith("combine")]
        rows.append(
            {
                "shape": name, "ranks": world, "tokens": case.tokens, "sms": case.sms or None, "step": step,
                "by": by, "replayed": replayed,
                "ms": timing.ms, "spread_ms": timing.spread_ms, "bytes": received,
                "gigabytes_per_second": received / timing.ms * 1e-6, "deepep_ms": mark,
            }
        )  # fmt: skip
    return rows


def render(report: dict[str, Any]) -> None:
    console = open_console(report)
    table = Table(
        "shape", "ranks", "T", "SMs a rank", "step", "by", "ms", "± ms", "GB/s a rank", "DeepEP ms", "ours is faster by"
    )
    for row in report["rows"]:
        mark = row["deepep_ms"]
        ratio = None if mark is None else mark / row["ms"]
        if row["by"] != OURS:
            ratio = row["ms"] / fastest_of_ours(report["rows"], row)
        table.add_row(
            row["shape"], str(row["ranks"]), str(row["tokens"]), str(row["sms"] or "own choice"), row["step"],
            row["by"] if row["replayed"] else f"{row['by']}, without a graph",
            f"{row['ms']:.3f}", f"{row['spread_ms']:.3f}", f"{row['gigabytes_per_second']:.0f}",
            "" if mark is None else f"{mark:.3f}", "" if ratio is None else f"{ratio:.2f}x",
        )  # fmt: skip
    console.print(table)


def fastest_of_ours(rows: Sequence[dict[str, Any]], peer: dict[str, Any]) -> float:
    """ms of our same step, with as many multiprocessors or, where the peer chooses them itself, with any."""
    same = [
        row for row in rows
        if row["by"] == OURS and all(row[key] == peer[key] for key in ("shape", "ranks", "tokens", "step"))
        and peer["sms"] in (None, row["sms"])
    ]  # fmt: skip
    return min(row["ms"] for row in same)
