"""What ``farskip convert`` does beyond the library: a progress bar, a table, indices as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from farskip_fused.connectivity import Connectivity
from farskip_fused.conversion.checkpoints import check_checkpoint, convert_checkpoint


def run(
    source: Path, target: Path | None, connectivity: Connectivity, layers: str, *, overwrite: bool, check: bool
) -> dict[str, Any]:
    """Converts ``source`` to ``target``, or checks ``source`` if there is no target; prints and returns the report."""
    console = Console()
    if target is None:
        report = check_checkpoint(source)
    else:
        chosen = [int(index) for index in layers.split(",")] if re.fullmatch(r"\d+(,\d+)*", layers) else layers
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("Linking or copying files", total=None)
            report = convert_checkpoint(
                source,
                target,
                connectivity,
                chosen,
                overwrite=overwrite,
                check=check,
                on_file=lambda file: progress.update(task, advance=1, description=file.name),
            )
    table = Table(title="FarSkip checkpoint", show_header=False)
    for name, value in report.items():
        table.add_row(name, _layers(value, report["num_layers"]) if name == "layers" else str(value))
    console.print(table)
    return report


def _layers(layers: list[int], num_layers: int) -> str:
    return "all" if len(layers) == num_layers else ", ".join(map(str, layers))
