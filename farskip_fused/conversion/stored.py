"""What a checkpoint directory holds, read from config.json, the index and the safetensors headers; no weights."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from farskip_fused.errors import UsageError
from farskip_fused.record import TYPE_PREFIX, stock_type

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredCheckpoint:
    """path: the directory; config: what config.json says; shapes: of every tensor, by its name in the files."""

    path: Path
    config: dict[str, Any]
    shapes: dict[str, list[int]]
    files: list[Path]

    @property
    def is_farskip(self) -> bool:
        return str(self.config["model_type"]).startswith(TYPE_PREFIX)

    @property
    def stock_type(self) -> str:
        return stock_type(self.config["model_type"])

    @property
    def num_layers(self) -> int:
        of_text = self.config.get("text_config", self.config)
        layers = of_text.get("num_hidden_layers") if isinstance(of_text, dict) else None
        if not isinstance(layers, int):
            raise UsageError(f"{self.path / CONFIG} has no num_hidden_layers.")
        return layers


def read_checkpoint(path: str | os.PathLike[str]) -> StoredCheckpoint:
    """Reads a local checkpoint, stock or converted.

    Raises UsageError, naming the file, for a missing directory or file, a half-written or truncated one, and tensors
    that the index lists and the files lack.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory; give that of a local checkpoint.")
    config = _read_json(directory / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise UsageError(f"{directory / CONFIG} has no model_type, so it is not the configuration of a model.")
    files, shapes = _read_headers(directory)
    return StoredCheckpoint(directory, config, shapes, files)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{file} is missing, so {file.parent} is not a complete checkpoint.") from None
    except ValueError as error:
        raise UsageError(f"{file} is damaged or half-written ({error}); restore it or write it again.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} must hold an object, but holds {type(content).__name__}.")
    return content


def _read_headers(directory: Path) -> tuple[list[Path], dict[str, list[int]]]:
    if (directory / INDEX).exists():
        located = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(located, dict) or not located:
            raise UsageError(f"{directory / INDEX} has no weight_map; restore it or write it again.")
        files = [directory / name for name in sorted(set(located.values()))]
    elif (directory / WEIGHTS).exists():
        located, files = {}, [directory / WEIGHTS]
    else:
        raise UsageError(f"{directory} has neither {WEIGHTS} nor {INDEX}; only safetensors checkpoints are supported.")
    shapes: dict[str, list[int]] = {}
    for file in files:
        shapes |= _read_header(file)
    lacking = [name for name in located if name not in shapes]
    if lacking:
        raise UsageError(f"{directory / INDEX} lists {some(lacking)}, which the files lack; write it again.")
    return files, shapes


def _read_header(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UsageError(f"{file} is missing, though the index lists it; the checkpoint is not complete.") from None
    except SafetensorError as error:
        raise UsageError(f"{file} is truncated or damaged ({error}); restore it or write it again.") from None


def some(names: list[str]) -> str:
    """The first names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def compare_names(
    found: dict[str, list[int]],
    expected: dict[str, list[int]],
    optional: set[str],
    ignored: list[str],
) -> list[str]:
    """What is wrong with the tensors of a checkpoint, one sentence a kind; empty if nothing is.

    optional: expected names that may be absent (tied weights); ignored: patterns of further names that may be there.
    """
    missing = sorted(expected.keys() - found.keys() - optional)
    extra = sorted(n for n in found.keys() - expected.keys() if not any(re.search(p, n) for p in ignored))
    reshaped = sorted(n for n in found.keys() & expected.keys() if list(found[n]) != list(expected[n]))
    kinds = (("are missing", missing), ("are unexpected", extra), ("have another shape", reshaped))
    return [f"{some(names)} {kind}" for kind, names in kinds if names]
