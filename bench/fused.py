"""`farskip bench fused`: how much of communication the expert layer hides, part by part, forward and backward.

On one GPU the ranks run side by side under MPS, each with its share of the multiprocessors and, where a link is named,
with its share of that link: stores to peers are paced to it. Computation and communication then relate as on whole GPUs
and the whole link.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from farskip_fused.bench.fused_ranks import PARTS, WAYS, Case, Measured, measure
from farskip_fused.bench.report import environment, open_console
from farskip_fused.bench.shapes import parse_shape
from farskip_fused.bench.timing import summarise
from farskip_fused.errors import UsageError
from farskip_fused.launch import RankFailed, multiprocessors_of_rank, run_ranks

RANKS, TOKENS = (4,), (4096,)
SHAPES = ("deepseek-v2-lite", "qwen3-30b-a3b")
LINKS = {"none": None, "nvlink4": 450.0}  # GB/s of a GPU in one direction, None for as fast as stores go
ITERATIONS = 30
LARGEST_DIFFERENCE = 0.02  # of fused from unfused results; bfloat16 sums that are rounded once more differ by 0.003


def parse_link(text: str) -> float | None:
    """GB/s of a named link, or of a number; anything else raises UsageError."""
    if text in LINKS:
        return LINKS[text]
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0.001 <= rate < float("inf"):
        raise UsageError(f"Unknown link {text!r}; use {', '.join(LINKS)}, or GB/s such as 50.")
    return rate


def run(
    shapes: Sequence[str], ranks: Sequence[int], links: Sequence[str], sms: Sequence[int | None], tokens: Sequence[int]
) -> dict[str, Any]:
    """Measure every shape with each number of ranks, link, number of multiprocessors and of tokens a rank; bfloat16.

    sms: multiprocessors a rank that communication takes, None for the package's share.
    Returns environment, failed (what raised, and what) and rows, one a part. Raises UsageError for an unknown shape or
    link, for experts that do not divide over the ranks, for more multiprocessors than there are, and without a GPU.
    """
    parsed = {name: parse_shape(name) for name in shapes}
    rates = {name: parse_link(name) for name in links}
    for name, shape in parsed.items():
        for world in ranks:
            if shape.experts % world:
                raise UsageError(f"{name} has {shape.experts} experts, which do not divide over {world} ranks.")
    if not torch.cuda.is_available():
        raise UsageError("farskip bench fused measures a CUDA GPU and this machine has none.")
    gpus = torch.cuda.device_count()
    sharing = {world: world if world > gpus else 1 for world in ranks}  # ranks that share a GPU
    for world in ranks:
        available = multiprocessors_of_rank(world)
        for wanted in sms:
            if wanted is not None and wanted >= available:
                raise UsageError(f"--sms {wanted}: {world} ranks have {available} each; leave the GEMMs some.")
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    console = Console(stderr=True)
    for world in ranks:
        for link, rate in rates.items():
            for name, shape in parsed.items():
                # A start of its own for each: slots keep the link that they were made for.
                title = f"{name}, {world} ranks, link {link}"
                cases = [Case(shape, count, share) for count in tokens for share in sms]
                own_rate = None if rate is None else max(int(rate * 1e3 / sharing[world]), 1)  # bytes a microsecond
                start = time.monotonic()
                try:
                    found = run_ranks(
                        measure, world, cases, own_rate, ITERATIONS, device="cuda", limit=400.0, wait_timeout=60.0
                    )
                except RankFailed as error:
                    failed[title] = str(error)
                    continue
                finally:
                    console.print(f"{title}: {time.monotonic() - start:.0f} s", highlight=False)
                for case, *measured in zip(cases, *found, strict=True):
                    rows += summary(name, case, link, own_rate, measured)
    return {"environment": environment(), "failed": failed, "rows": rows}


def summary(
    name: str, case: Case, link: str, link_rate: int | None, measured: Sequence[Measured]
) -> list[dict[str, Any]]:
    """One row a part: the slowest rank of each iteration counts, and the rank that receives most.

    comm of results that GEMMs store at other ranks is what the link takes for them, where one is named, and then the
    sum; in the rest of a layer's comm, and on no link, what was measured.
    ratio: fused over the longer of comm and gemm, 1 where the shorter hides completely. speedup: unfused over fused.
    """
    rows = []
    for part in PARTS:
        slowest = {
            way: [max(each) for each in zip(*(one.times[part][way] for one in measured), strict=True)]
            for way in measured[0].times[part]
        }
        links = [one.link_ms[part] for one in measured]
        link_ms = None if None in links else max(each for each in links if each is not None)
        slowest["comm"] = [each + (link_ms or 0.0) for each in slowest["comm"]]
        times = {way: summarise(each) for way, each in slowest.items()}
        comm, gemm, fused = times["comm"].ms, times["gemm"].ms, times["fused"].ms
        received = max(one.received[part] for one in measured)
        differences = [one.differences[part] for one in measured if part in one.differences]
        rows.append(
            {
                "shape": name, "ranks": len(measured), "tokens": case.tokens, "link": link,
                "link_gigabytes_per_second": None if link_rate is None else link_rate * 1e-3, "part": part,
                "comm_sms": measured[0].comm_sms, "gemm_sms": measured[0].gemm_sms,
                **{f"{way}_ms": timing.ms for way, timing in times.items()},
                **{f"{way}_spread_ms": timing.spread_ms for way, timing in times.items()},
                "link_ms": link_ms, "ratio": fused / max(comm, gemm), "speedup": times["unfused"].ms / fused,
                "bytes": received, "gigabytes_per_second": received / fused * 1e-6,
                "comm_gigabytes_per_second": received / comm * 1e-6,
                "difference": float(torch.tensor(differences).max()) if differences else None,
            }
        )  # fmt: skip
    return rows


def render(report: dict[str, Any]) -> None:
    console = open_console(report)
    table = Table(
        "shape", "ranks", "T", "link GB/s", "SMs", "part", "comm ms", "GEMM ms", "unfused ms", "fused ms",
        "fused / longer", "unfused / fused", "MB", "GB/s",
    )  # fmt: skip
    for row in report["rows"]:
        rate = row["link_gigabytes_per_second"]
        table.add_row(
            row["shape"], str(row["ranks"]), str(row["tokens"]),
            row["link"] if rate is None else f"{row['link']} {rate:.0f}", f"{row['comm_sms']} + {row['gemm_sms']}",
            row["part"],
            *(f"{row[f'{way}_ms']:.3f} ± {row[f'{way}_spread_ms']:.3f}" for way in WAYS),
            f"{row['ratio']:.2f}", f"{row['speedup']:.2f}x", f"{row['bytes'] * 1e-6:.1f}",
            f"{row['gigabytes_per_second']:.0f}",
        )  # fmt: skip
    console.print(table)
    for row in report["rows"]:
        # Not at most: a difference that is no number is one, too.
        if row["difference"] is not None and not row["difference"] <= LARGEST_DIFFERENCE:
            console.print(
                f"{row['shape']}, {row['ranks']} ranks, link {row['link']}, {row['part']}: fused and unfused results "
                f"differ by {row['difference']:.3g}, so these times are of no use.",
            )  # fmt: skip
