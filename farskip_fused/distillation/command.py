"""What ``farskip distill`` and ``farskip eval`` do beyond the library: checkpoints in and out, and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from farskip_fused.distillation.data import as_blocks
from farskip_fused.distillation.evaluation import Evaluation, evaluate
from farskip_fused.distillation.trainer import DistillationConfig, distill
from farskip_fused.errors import UsageError


def run_distill(
    source: Path,
    target: Path,
    data: Path,
    validation: Path | None,
    config: DistillationConfig,
    *,
    teacher: Path | None,
    device: str | None,
    overwrite: bool,
) -> dict[str, Any]:
    """Trains the checkpoint ``source`` and saves the result, with its tokenizer, to ``target``."""
    if target.exists() and not target.is_dir():
        raise UsageError(f"OUTPUT {target} is a file; name a directory.")
    if target.exists() and not overwrite:
        raise UsageError(f"OUTPUT {target} exists; name another or pass --overwrite.")
    if target.resolve() == source.resolve():
        raise UsageError(f"OUTPUT {target} is MODEL_DIR itself; name another directory.")
    console = Console()
    with console.status("Loading the checkpoint and the data"):
        model, tokenizer = _load(source, device), _tokenizer(source)
        taught_by = None if teacher is None else _load(teacher, device)
        blocks = as_blocks(data, config.block_length, tokenizer)
        held_out = None if validation is None else as_blocks(validation, config.block_length, tokenizer)
    report = distill(model, blocks, config, teacher=taught_by, validation=held_out, console=console)
    with console.status("Saving"):
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    result = {"model": str(source), "output": str(target)} | report.to_dict()
    for _, evaluation in report.evaluations[-1:]:
        console.print(_table(target, evaluation))
    console.print(
        f"{report.steps} steps, {report.tokens:,} tokens, {report.tokens_per_second:,.0f} tokens/s,"
        f" loss {report.losses[0][1]:.4f} at first and {report.losses[-1][1]:.4f} at last; saved to {target}"
    )
    return result


def run_eval(
    source: Path, data: Path, *, teacher: Path | None, block_length: int, device: str | None
) -> dict[str, Any]:
    """Evaluates the checkpoint ``source``, stock or FarSkip, on text; prints and returns the result."""
    console = Console()
    with console.status("Loading the checkpoint and the data"):
        model = _load(source, device)
        taught_by = None if teacher is None else _load(teacher, device)
        blocks = as_blocks(data, block_length, _tokenizer(source))
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"Evaluating on {blocks.numel():,} tokens", total=len(blocks))
        evaluation = evaluate(model, blocks, taught_by, on_batch=lambda count: progress.update(task, advance=count))
    console.print(_table(source, evaluation))
    return {"model": str(source), "tokens": blocks.numel()} | evaluation.to_dict()


def _load(path: Path, device: str | None) -> Any:
    """A FarSkip checkpoint by ``load``, which accounts for every tensor; a stock one by transformers."""
    from transformers import AutoModelForCausalLM

    from farskip_fused.conversion import load
    from farskip_fused.conversion.stored import read_checkpoint

    where = _device(device)
    if read_checkpoint(path).is_farskip:
        return load(path, device_map=where)
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, device_map=where)


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} holds no tokenizer; save the model's tokenizer there.") from error


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise UsageError(f"Device {name!r} is not there: {str(error).splitlines()[0]}") from error
    return device


def _table(path: Path, evaluation: Evaluation) -> Table:
    table = Table(title=str(path), show_header=False)
    rows = {
        "cross-entropy, nats a token": evaluation.val_ce,
        "KL to teacher, nats a token": evaluation.kl,
        "top-1 agreement with teacher": evaluation.agreement,
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, f"{value:.4f}")
    return table
