"""The report of ``farskip doctor`` on a terminal, and as a block of Markdown for an issue."""

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
    package = facts.package or "not installed"
    if facts.checkout:
        package += f" (checkout{f' at {facts.commit}' if facts.commit else ''})"
    return [
        ("farskip-fused", package),
        ("extension _C", _EXTENSION[facts.extension]),
        ("Python", f"{facts.python}, {facts.platform}"),
        ("torch", torch),
        *kernel_stack,
        ("GPU", "\n".join(names + unseen) or "-"),
        ("NVIDIA driver", facts.driver or "-"),
        ("MPS", _MPS[facts.mps]),
        ("NCCL", facts.nccl or "-"),
        *nvshmem.items(),
        ("NVSHMEM library", facts.nvshmem_library or "-"),
        ("NVSHMEM bitcode", ", ".join(Path(path).name for path in facts.bitcode) or "-"),
        *versions.items(),
        ("C++ compiler", _with_version(facts.compiler, facts.compiler_version)),
        ("nvcc", _with_version(facts.nvcc, facts.nvcc_version)),
    ]


def issue(report: Report) -> str:
    """Markdown to paste into an issue: all facts with topology and environment variables, then the problems.

    The user's home directory is written as ``~``.
    """
    facts = report.facts
    lines = [f"{name:20} {value}".replace("\n", f"\n{'':21}") for name, value in rows(facts)]
    lines += ["", *(f"{name}={value}" for name, value in facts.variables.items())] if facts.variables else []
    lines += ["", facts.topology.rstrip()] if facts.topology else []
    problems = [f"- {'broken' if one.broken else 'missing'}: {one.what} `{one.command}`" for one in report.problems]
    text = "\n".join(["```text", *lines, "```", *problems])
    return text.replace(f"{Path.home()}/", "~/")


def _with_version(program: str | None, version: str | None) -> str:
    return "-" if program is None else program if version is None else f"{program} ({version})"


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
