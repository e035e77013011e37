"""The files of bench/results/, whose names say the machine and the benchmark: ``two-h200-layer-qwen3.json``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent / "results"
COUNTS = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Result(NamedTuple):
    """What a benchmark wrote on so many GPUs."""

    path: Path
    gpus: int
    report: dict[str, Any]


def machine(gpu: str, gpus: int) -> str:
    """``two-h200`` for two of "NVIDIA H200", ``h200`` for one."""
    short = next((word for word in re.findall(r"[a-z0-9]+", gpu.lower()) if re.search(r"\d", word)), "gpu")
    return short if gpus == 1 else f"{COUNTS[gpus]}-{short}"


def find(benchmark: str, *, several: bool, folder: Path = FOLDER) -> list[Result]:
    """Results of a benchmark on one GPU, or on several, fewest GPUs first.

    benchmark: what follows the machine in a file's name, as a regular expression.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        matched = re.fullmatch(rf"(?:({'|'.join(COUNTS[2:])})-)?[a-z0-9]+-{benchmark}", path.stem)
        if matched and bool(matched[1]) == several:
            gpus = COUNTS.index(matched[1] or "one")
            found.append(Result(path, gpus, json.loads(path.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda result: result.gpus)
