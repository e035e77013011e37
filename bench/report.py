"""What a benchmark's JSON holds, as tables and as a roofline figure; and tables in documents."""

from __future__ import annotations

import datetime
import importlib.metadata
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from farskip_fused.errors import UsageError

DIRECTIONS = {"forward": 6, "forward_backward": 18}


def environment() -> dict[str, str]:
    """GPU, driver, versions and date of a run."""
    import torch
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    driver = answer.partition("\n")[0].strip()  # one line for each GPU
    facts = {
        "gpu": torch.cuda.get_device_name(), "gpus": str(torch.cuda.device_count()), "driver": driver,
        "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    if torch.distributed.is_nccl_available():
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for package in ("nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13", "sonic-moe", "vllm"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def open_console(report: Mapping[str, Any]) -> Console:
    """A console on which the environment of a report stands, and what it lacks, and why."""
    console = Console(highlight=False)
    console.print(" ".join(f"{key} {value}" for key, value in report["environment"].items()))
    for what in ("missing", "failed"):
        for name, reason in report.get(what, {}).items():
            console.print(f"{name} {'failed' if what == 'failed' else 'is left out'}: {reason}", markup=False)
    return console


def replace_between(text: str, marks: tuple[str, str], content: str) -> str:
    """``text`` with what stands between two marks replaced; UsageError if it lacks one of them."""
    before, start, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not start or not end:
        raise UsageError(f"There is no {marks[0]} followed by {marks[1]} to write between.")
    return f"{before}{start}\n{content}\n{end}{after}"


def best_peer(cells: dict[str, Any]) -> float | None:
    """ms of the fastest layer that is neither ours nor the limit."""
    return min((cell["ms"] for name, cell in cells.items() if name not in ("ours", "dense")), default=None)


def render(report: dict[str, Any]) -> None:
    """Print the tables of a report."""
    from rich.table import Table

    console = open_console(report)
    ceilings = report["ceilings"]
    console.print(f"ceilings: {ceilings['tflops']:.0f} TFLOP/s, copy {ceilings['terabytes']:.2f} TB/s")
    if report["layers"]:
        table = Table("shape", "T", "pass", "layer", "ms", "± ms", "TFLOP/s", "of dense", "ours is faster by")
        for layer in report["layers"]:
            for direction in DIRECTIONS:
                cells = layer[direction]
                for name, cell in cells.items():
                    ratio = "" if name in ("ours", "dense") else f"{cell['ms'] / cells['ours']['ms']:.2f}x"
                    table.add_row(
                        layer["shape"], str(layer["tokens"]), "f" if direction == "forward" else "f+b", name,
                        f"{cell['ms']:.3f}", f"{cell['spread_ms']:.3f}", f"{cell['tflops']:.0f}",
                        f"{cells['dense']['ms'] / cell['ms']:.0%}", ratio,
                    )  # fmt: skip
        console.print(table)
        for layer in report["layers"]:
            saved = layer["saved_bytes"]
            console.print(
                f"{layer['shape']}, T {layer['tokens']}, {layer['routing']}: {saved['measured'] / 1e6:.1f} MB saved for"
                f" backward; 2 T H + 4 T K I is {saved['formula'] / 1e6:.1f} MB"
            )
            if saved.get("held") is not None:
                indices, held = saved["indices"] / 1e6, saved["held"] / 1e6
                console.print(f"  of it {indices:.1f} MB indices; the allocator holds {held:.1f} MB")
            for direction, ratio in layer.get("zipf_over_uniform", {}).items():
                console.print(f"  {direction.replace('_', ' + ')}: {ratio:.2f} x uniform routing")
    if report["decode"]:
        table = Table("shape", "T", "layer", "µs", "± µs", "TB/s of weights", "of copy", "ours is faster by")
        for row in report["decode"]:
            for name in [key for key in row if isinstance(row[key], dict)]:
                cell = row[name]
                ratio = "" if name == "ours" else f"{cell['ms'] / row['ours']['ms']:.2f}x"
                table.add_row(
                    row["shape"], str(row["tokens"]), name, f"{1e3 * cell['ms']:.1f}", f"{1e3 * cell['spread_ms']:.1f}",
                    f"{cell['terabytes']:.2f}", f"{cell['terabytes'] / ceilings['terabytes']:.0%}", ratio,
                )  # fmt: skip
        console.print(table)

    if report.get("gemms"):
        table = Table("shape", "T", "kernel", "ms", "± ms", "TFLOP/s", "TB/s", "of matmul", "of copy")
        for row in report["gemms"]:
            table.add_row(
                row["shape"], str(row["tokens"]), row["kernel"], f"{row['ms']:.4f}", f"{row['spread_ms']:.4f}",
                f"{row['tflops']:.0f}", f"{row['terabytes']:.2f}",
                f"{row['tflops'] / ceilings['tflops']:.0%}", f"{row['terabytes'] / ceilings['terabytes']:.0%}",
            )  # fmt: skip
        console.print(table)


def draw_roofline(report: dict[str, Any], path: Path) -> None:
    """Every layer of the report under the measured ceilings: FLOPs a byte, each operand moved once, and TFLOP/s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ceilings = report["ceilings"]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    markers = {"dense": "_", "ours": "o", "grouped_mm": "^", "vllm": "s", "sonicmoe": "D"}
    colors = {"forward": "tab:blue", "forward_backward": "tab:orange"}
    for layer in report["layers"]:
        for direction, factor in DIRECTIONS.items():
            for name, cell in layer[direction].items():
                axes.plot(
                    intensity(layer, factor), cell["tflops"], markers[name], color=colors[direction],
                    fillstyle="full" if name == "ours" else "none", label=f"{name}, {direction.replace('_', ' + ')}",
                )  # fmt: skip
    ridge = ceilings["tflops"] / ceilings["terabytes"]
    reach = [ridge / 20, ridge, max(axes.get_xlim()[1], 2 * ridge)]
    axes.plot(reach, [min(ceilings["tflops"], x * ceilings["terabytes"]) for x in reach], "k-", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s", title=report["environment"]["gpu"])
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def intensity(layer: dict[str, Any], factor: int) -> float:
    """FLOPs a byte of memory traffic where weights and rows move once (gradients too, in training), in bf16."""
    entries = layer["tokens"] * layer["top_k"]
    weights = 3 * layer["experts"] * layer["hidden"] * layer["intermediate"]
    rows = 2 * layer["tokens"] * layer["hidden"] + entries * layer["intermediate"]
    moved = 2 * (weights + rows) * (1 if factor == 6 else 3)
    return factor * entries * layer["hidden"] * layer["intermediate"] / moved
