"""The option ``--json FILE`` of every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from farskip_fused.errors import UsageError


def _checked_json_path(path: Path | None) -> Path | None:
    """Refuses a path that cannot be written before the work of a command is done, not after."""
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"--json {path}: the directory {path.parent} does not exist; create it or name another.")
    if path is not None and path.is_dir():
        raise UsageError(f"--json {path} is a directory; name a file.")
    return path


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", callback=_checked_json_path, help="Write the result to FILE as JSON."),
]


def write_json(path: Path | None, report: Any) -> None:
    """What every command does with its ``json_file: JsonFile = None``: write ``report`` there if a file was named."""
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
