"""`python -m farskip_fused.bench.suite`, which `make bench` runs: every benchmark whose results README shows.

What this machine has no GPUs or packages for is left out, with the reason. Each part runs by its own command, prints
its tables and, where it succeeds, replaces its file in bench/results/, whose name says the kind and number of GPUs.
Then the tables of README.md and docs/plan-accuracy.md are written anew from all files there, so that nothing is lost if
a later part is interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from farskip_fused.bench.result_files import FOLDER, machine
from farskip_fused.doctor.facts import mps_state

ROOT = FOLDER.parents[1]
WORLDS = (2, 4, 8)
CLI = ("-m", "farskip_fused.cli", "bench")
MODELS = {"v2-lite": "deepseek-v2-lite", "qwen3": "qwen3-30b-a3b"}
# (document, the command that writes it)
DOCUMENTS = {"README.md": "farskip_fused.bench.readme", "docs/plan-accuracy.md": "farskip_fused.bench.plan_accuracy"}


@dataclass(frozen=True)
class Part:
    """A benchmark on so many GPUs. file: its result's name after the machine. needs: what there must be besides."""

    name: str
    gpus: int
    file: str
    command: tuple[str, ...]
    minutes: int
    needs: tuple[str, ...] = ()


def parts(gpus: int) -> list[Part]:
    """All that so many GPUs allow, those of one GPU first."""
    models, v2_lite = tuple(MODELS.values()), MODELS["v2-lite"]
    side_by_side = ("--ranks", "4")
    found = [
        Part("experts", 1, "experts-fine-grained", (*CLI, "experts", *models), 6),
        Part("decode", 1, "experts-decode", (*CLI, "experts", *models, "--decode", "--peer", "vllm"), 6),
        Part(
            "comm", 1, "comm-4-ranks", (*CLI, "comm", v2_lite, "deepseek-v3", *side_by_side, "--tokens", "4096"), 7,
            ("nvshmem", "mps"),
        ),
        Part("fused", 1, "fused-4-ranks", (*CLI, "fused", v2_lite, *side_by_side), 7, ("nvshmem", "mps")),
    ]  # fmt: skip
    for short, name in MODELS.items():
        found += _in_vllm(short, (*CLI, "vllm", name), 1, ("vllm",))
    for world in WORLDS:
        ranks = ("--ranks", str(world))
        splits = ("--sms", "20", "--sms", "8", "--tokens", "4096", "--tokens", "128")
        found += [
            Part("comm", world, "comm", (*CLI, "comm", *models, *ranks, *splits), 8, ("nvshmem",)),
            Part("fused", world, "fused", (*CLI, "fused", v2_lite, *ranks, "--link", "none"), 5, ("nvshmem",)),
            Part("all-reduce", world, "all-reduce", (*CLI, "all-reduce", *ranks), 5, ("nvshmem",)),
        ]
        for short, name in MODELS.items():
            layer = (*CLI, "layer", name, *ranks)
            stores, puts = ("--link", "none", "--link", "50"), ("--link", "ib400")
            sizes = ("--link", "none", "--tokens", "1024", "--tokens", "8192")
            found += [
                Part("layer", world, f"layer-{short}", (*layer, *stores), 8, ("nvshmem",)),
                Part("layer", world, f"layer-{short}-tokens", (*layer, *sizes), 8, ("nvshmem",)),
                Part("layer", world, f"layer-{short}-ib400", (*layer, *puts), 8, ("nvshmem",)),
                *_in_vllm(short, (*CLI, "vllm", name, *ranks), world, ("vllm", "nvshmem")),
            ]
    recovery = ("-m", "farskip_fused.bench.recovery", "--seconds", "3600", "--write", "docs")
    found.append(Part("recovery", 1, "recovery", recovery, 80, ("transformers",)))
    return [part for part in found if part.gpus <= gpus]


def _in_vllm(short: str, command: tuple[str, ...], gpus: int, needs: tuple[str, ...]) -> list[Part]:
    """How long a model's requests take, and how long GPUs are busy with them."""
    return [
        Part("vllm", gpus, f"vllm-{short}", command, 15, needs),
        Part("vllm", gpus, f"vllm-{short}-gpu", (*command, "--gpu-time", "--rounds", "5"), 15, needs),
    ]


def missing_for(part: Part) -> str | None:
    """What this machine lacks for a part, and how to get it."""
    commands = {
        "nvshmem": "pip install 'farskip-fused[nvshmem-cu13]', or -cu12",
        "transformers": "pip install 'farskip-fused[hf]'",
        "vllm": "pip install 'farskip-fused[vllm]'",
    }
    for name in part.needs:
        if name == "mps":
            if mps_state() == "missing":
                return "CUDA MPS is not there: nvidia-cuda-mps-control is not on the PATH"
        elif importlib.util.find_spec(name) is None:
            return f"{name} is not installed; {commands[name]}"
    return None


def gpus_here() -> list[str]:
    """Names of the GPUs that torch sees, asked of another process: this one stays off them."""
    program = "import torch; [print(torch.cuda.get_device_name(at)) for at in range(torch.cuda.device_count())]"
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return asked.stdout.splitlines()


def run(chosen: Sequence[Part], gpu: str) -> dict[Part, str]:
    """Run the parts; how each went. gpu: the name of the machine's GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")
    console = Console(stderr=True, highlight=False)
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in chosen:
            reason = missing_for(part)
            if reason is not None:
                outcomes[part] = f"left out: {reason}"
                continue
            target = FOLDER / f"{machine(gpu, part.gpus)}-{part.file}.json"
            written = Path(folder) / target.name
            console.rule(f"{part.name}, {part.gpus} GPUs: {target.name}" if part.gpus > 1 else target.name)
            devices = ",".join(visible[: part.gpus])
            start = time.monotonic()
            code = _finish([sys.executable, *part.command, "--json", str(written)], devices, 60.0 * part.minutes)
            took = f"{time.monotonic() - start:.0f} s"
            if code != 0 or not written.exists():
                why = "out of time" if code is None else f"exit code {code}" if code else "it left no result"
                outcomes[part] = f"failed after {took}: {why}"
                continue
            target.write_bytes(written.read_bytes())
            unwritten = write_documents()
            outcomes[part] = f"failed: {unwritten}" if unwritten else f"done in {took}"
    return outcomes


def _finish(command: Sequence[str], devices: str, seconds: float) -> int | None:
    """Exit code of a command that sees these GPUs; None if it had to be stopped."""
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": devices})
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # not killed at once: its ranks must be taken down
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return None


def write_documents() -> str | None:
    """Write the tables of all results anew; what went wrong, if something did."""
    for document, module in DOCUMENTS.items():
        command = [sys.executable, "-m", module, "--write", document]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            return f"{document} was not written: {done.stderr.strip().splitlines()[-1]}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(part.name for part in parts(WORLDS[-1])))
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(names)}; all if none is named")
    parser.add_argument("--gpus", type=int, choices=(1, *WORLDS), help="only what runs on so many; all by default")
    options = parser.parse_args(arguments)
    for name in options.parts:
        if name not in names:
            parser.error(f"unknown part {name!r}; use {', '.join(names)}")
    if not (ROOT / "README.md").exists():
        parser.error(f"{ROOT} is not a checkout of farskip-fused, whose README.md this writes; run it in one")
    here = gpus_here()
    if not here:
        parser.error("the benchmarks measure CUDA GPUs and torch sees none here")
    if options.gpus is not None and options.gpus > len(here):
        parser.error(f"--gpus {options.gpus}: torch sees {len(here)} here")
    chosen = [
        part for part in parts(len(here))
        if part.name in (options.parts or names) and options.gpus in (None, part.gpus)
    ]  # fmt: skip
    outcomes = run(chosen, here[0])
    table = Table("part", "GPUs", "result", box=None)
    for part, outcome in outcomes.items():
        table.add_row(part.name, str(part.gpus), f"{part.file}: {outcome}")
    Console(highlight=False).print(table)
    return int(any(outcome.startswith("failed") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
