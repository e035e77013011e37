"""What training reports while it runs: a progress bar, lines of JSON, TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from farskip_fused.errors import UsageError

JSONL = "log.jsonl"


class Logs:
    """Writes ``log.jsonl`` in a folder, a line for each step and each evaluation, and the same to TensorBoard.

    folder: None to write nothing. from_step: the step that a resumed training goes on after; lines of later ones are
    dropped. Raises UsageError if TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path | None, *, tensorboard: bool = False, from_step: int = 0) -> None:
        self._file = self._writer = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._writer = _tensorboard(folder, from_step)
        path = folder / JSONL
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= from_step] if from_step else []
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(kept)

    def write(self, kind: str, step: int, tokens: int, values: dict[str, Any]) -> None:
        """Values of a step, counted from 1, after so many tokens; kind: "step", "evaluation", "metric" or "skipped"."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "step": step, "tokens": tokens, **values}) + "\n")
            self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for each in (self._file, self._writer):
            if each is not None:
                each.close()


def progress_bar(console: Any) -> Progress:
    """With loss, tokens a second, most memory so far and the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, {task.fields[speed]:,.0f} tokens/s{task.fields[memory]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _lines(path: Path) -> list[str]:
    # The last line of a killed process may be torn.
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def _tensorboard(folder: Path, from_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise UsageError("TensorBoard is not installed; run: pip install 'farskip-fused[distill]'.") from error
    return SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else None)
