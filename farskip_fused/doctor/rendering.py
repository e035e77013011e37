"""The report of ``farskip doctor`` on a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from farskip_fused.doctor.facts import Facts
from farskip_fused.doctor.verdict import Report

_EXTENSION = {"cuda": "built with CUDA", "cpu": "built, CPU part alone", "missing": "missing"}
_MPS = {"running": "daemon runs", "stopped": "installed, no daemon runs", "missing": "-"}


def rows(facts: Facts) -> list[tuple[str, str]]:
    """What is there, as (name, value) lines; a dash for what is not."""
    versions = {name: version or "-" for name, version in facts.versions.items()}
    torch = versions.pop("torch")
    if facts.versions["torch"] and not facts.torch_error:
        torch += f" (CUDA {facts.torch_cuda})" if facts.torch_cuda else " (without CUDA)"
    nvshmem = {name: versions.pop(name) for name in list(versions) if "nvshmem" in name}
    kernel_stack = [("triton", versions.pop("triton")), ("numpy", versions.pop("numpy"))]
    names = [f"{gpu.name} (sm_{gpu.architecture}, {gpu.memory:g} GiB)" for gpu in facts.gpus]
    unseen = [f"{name} (torch does not see it)" for name in facts.driver_gpus[len(names) :]]
    return [
        ("farskip-fused", facts.package or "not installed"),
        ("extension _C", _EXTENSION[facts.extension]),
        ("Python", f"{facts.python}, {facts.platform}"),
        ("torch", torch),
        *kernel_stack,
        ("GPU", "\n".join(names + unseen) or "-"),
        ("NVIDIA driver", facts.driver or "-"),
        ("MPS", _MPS[facts.mps]),
        *nvshmem.items(),
        ("NVSHMEM library", facts.nvshmem_library or "-"),
        ("NVSHMEM bitcode", ", ".join(Path(path).name for path in facts.bitcode) or "-"),
        *versions.items(),
        ("C++ compiler", facts.compiler or "-"),
        ("nvcc", facts.nvcc or "-"),
    ]


def render(report: Report) -> None:
    """Print what is there, then each problem with its command on a line of its own, to copy."""
    console = Console(highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows(report.facts):
        table.add_row(name, escape(value), style="dim" if value == "-" else None)
    console.print(table)
    for problem in report.problems:
        label = "[bold red]broken[/]" if problem.broken else "[yellow]missing[/]"
        console.print(f"\n{label}  {escape(problem.what)}", soft_wrap=True)
        console.print(f"  {escape(problem.command)}", soft_wrap=True)
    verdict = (
        "This environment is usable." if report.usable else "This environment is broken; the commands above mend it."
    )
    console.print(f"\n{verdict}")
