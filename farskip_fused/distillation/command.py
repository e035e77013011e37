"""What ``farskip distill`` and ``farskip eval`` do beyond the library: checkpoints in and out, ranks, and tables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from farskip_fused.distillation.config import DistillationConfig
from farskip_fused.distillation.data import as_blocks
from farskip_fused.distillation.evaluation import evaluate
from farskip_fused.distillation.forward import head_of
from farskip_fused.distillation.memory import loss_memory
from farskip_fused.distillation.saving import save_trained, stored_dtypes
from farskip_fused.distillation.sweep import STEPS, Sweep, sweep
from farskip_fused.distillation.tasks import Task, function_tasks, human_eval_tasks, mbpp_tasks, pass_rate
from farskip_fused.distillation.tasks.harness import lm_eval_scores
from farskip_fused.distillation.tasks.solving import metric
from farskip_fused.distillation.trainer import distill
from farskip_fused.errors import UsageError

FUNCTIONS = "functions"
# Of the built-in benchmark, for early stopping: the 2 % of the paper are four tasks.
METRIC_TASKS = 200


@dataclass(frozen=True)
class DistillJob:
    """What ``farskip distill`` is asked for, beside how to train.

    source, target: checkpoint directories. data, validation: text. teacher: a checkpoint, None for the source itself.
    connectivity, layers: to convert the source to, None to take it as it is. stop_on: "functions" or an MBPP file.
    work: folder of logs and training states. dtype: to load the weights in.
    """

    source: Path
    target: Path
    data: Path
    validation: Path | None = None
    teacher: Path | None = None
    connectivity: str | None = None
    layers: str | None = None
    stop_on: str | None = None
    sweeps: tuple[str, ...] = ()
    sweep_steps: int = STEPS
    work: Path | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    tensorboard: bool = False
    parallel: str | None = None
    device: str | None = None
    dtype: str | None = None
    overwrite: bool = False


def run_distill(job: DistillJob, config: DistillationConfig) -> dict[str, Any]:
    """Trains the checkpoint ``source`` and saves the result, with its tokenizer, to ``target``.

    Raises FloatingPointError when training diverges; what is saved then are the weights that it ended with.
    """
    _check_target(job)
    _check_options(job)
    with _ranks(job.parallel) as rank:
        console = Console(quiet=rank > 0)
        with console.status("Loading the checkpoint and the data"):
            device = _device("cpu" if job.parallel == "fsdp" else job.device)
            model, tokenizer = _student(job, device), _tokenizer(job.source)
            taught_by = None if job.teacher is None else _load(job.teacher, device, job.dtype)
            options = {"answers_only": config.answers_only}
            blocks = as_blocks(job.data, config.block_length, tokenizer, **options)
            held_out = None
            if job.validation is not None:
                held_out = as_blocks(job.validation, config.block_length, tokenizer, **options)
            tasks = None if job.stop_on is None else _tasks(job.stop_on)
        sweeps: list[Sweep] = []
        for over in job.sweeps:
            found = sweep(model, blocks, config, over, steps=job.sweep_steps, teacher=taught_by, console=console)
            console.print(_sweep_table(found))
            sweeps, config = [*sweeps, found], found.config
        if config.objective != "sft":
            console.print(loss_memory(config.micro_batch_tokens, head_of(model), config.chunk_size))
        dtype, dtypes = model.dtype, stored_dtypes(model)
        # A rank's experts take no more tokens than its passes in training have.
        most_tokens = max(config.micro_batch_tokens, blocks.block_length) if job.parallel == "ep" else None
        together = {"most_tokens": most_tokens, "together": job.parallel is not None}
        looked_at = None if tasks is None else metric(tokenizer, tasks, **together)
        diverged: FloatingPointError | None = None
        try:
            report = distill(
                model, blocks, config, teacher=taught_by, validation=held_out, metric=looked_at, parallel=job.parallel,
                folder=job.work, checkpoint_every=job.checkpoint_every, resume=job.resume, tensorboard=job.tensorboard,
                console=console,
            )  # fmt: skip
        except FloatingPointError as error:
            diverged = error
        with console.status("Saving"):
            save_trained(model, job.target, dtype, dtypes)
            if rank == 0:
                tokenizer.save_pretrained(job.target)
        if diverged is not None:
            raise FloatingPointError(f"{diverged} They are saved to {job.target}.")
    result = {"model": str(job.source), "output": str(job.target), "config": asdict(config)} | report.to_dict()
    result["sweeps"] = [each.to_dict() for each in sweeps]
    for _, evaluation in report.evaluations[-1:]:
        console.print(_table(job.target, evaluation.to_dict()))
    memory = "" if report.peak_bytes is None else f", {report.peak_bytes / 2**30:.1f} GiB of GPU memory at most"
    stopped = " (stopped early)" if report.stopped_early else ""
    console.print(
        f"{report.steps} steps{stopped}, {report.tokens:,} tokens, {report.tokens_per_second:,.0f} tokens/s{memory},"
        f" {len(report.skipped)} steps skipped, loss {report.losses[0][1]:.4f} at first and {report.losses[-1][1]:.4f}"
        f" at last; saved to {job.target}"
    )
    return result


@dataclass(frozen=True)
class EvalJob:
    """What ``farskip eval`` is asked for: what is None or empty is left out.

    data: text. teacher: a checkpoint to compare with on it. functions: tasks of the built-in benchmark. mbpp: a file.
    tasks: of lm-eval, with descriptions in ``task_folder`` and at most ``limit`` examples each.
    """

    source: Path
    data: Path | None = None
    teacher: Path | None = None
    block_length: int = 1024
    functions: int = 0
    human_eval: bool = False
    mbpp: Path | None = None
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    limit: int | None = None
    max_new_tokens: int = 256
    device: str | None = None
    dtype: str | None = None


def run_eval(job: EvalJob) -> dict[str, Any]:
    """Evaluates a checkpoint, stock or FarSkip; prints and returns the result."""
    if not (job.data or job.functions or job.human_eval or job.mbpp or job.tasks):
        raise UsageError("Nothing to evaluate; give --data, --functions, --human-eval, --mbpp or --task.")
    if job.teacher is not None and job.data is None:
        raise UsageError("A teacher is compared with on text; give --data.")
    console = Console()
    benchmarks = {
        "functions": function_tasks(job.functions) if job.functions else None,
        "human_eval": human_eval_tasks() if job.human_eval else None,
        "mbpp": mbpp_tasks(job.mbpp) if job.mbpp else None,
    }
    with console.status("Loading the checkpoint"):
        model, tokenizer = _load(job.source, _device(job.device), job.dtype), _tokenizer(job.source)
    result: dict[str, Any] = {"model": str(job.source)}
    if job.data is not None:
        result |= _on_text(job, model, tokenizer, console)
    for name, tasks in benchmarks.items():
        if tasks:
            with Progress(console=console, transient=True) as progress:
                bar = progress.add_task(f"Solving {len(tasks)} tasks of {name}", total=len(tasks))
                solved = pass_rate(
                    model, tokenizer, tasks, max_new_tokens=job.max_new_tokens,
                    on_batch=lambda count: progress.update(bar, advance=count),  # noqa: B023
                )  # fmt: skip
            result[name] = solved.to_dict()
    if job.tasks:
        result["lm_eval"] = lm_eval_scores(model, tokenizer, job.tasks, folder=job.task_folder, limit=job.limit)
    console.print(_table(job.source, result))
    return result


def _on_text(job: EvalJob, model: Any, tokenizer: Any, console: Console) -> dict[str, Any]:
    with console.status("Loading the data"):
        taught_by = None if job.teacher is None else _load(job.teacher, _device(job.device), job.dtype)
        blocks = as_blocks(job.data, job.block_length, tokenizer)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"Evaluating on {blocks.numel():,} tokens", total=len(blocks))
        evaluation = evaluate(model, blocks, taught_by, on_batch=lambda count: progress.update(task, advance=count))
    return {"tokens": blocks.numel()} | evaluation.to_dict()


def _check_target(job: DistillJob) -> None:
    if job.target.exists() and not job.target.is_dir():
        raise UsageError(f"OUTPUT {job.target} is a file; name a directory.")
    if job.target.exists() and not job.overwrite:
        raise UsageError(f"OUTPUT {job.target} exists; name another or pass --overwrite.")
    if job.target.resolve() == job.source.resolve():
        raise UsageError(f"OUTPUT {job.target} is MODEL_DIR itself; name another directory.")


def _check_options(job: DistillJob) -> None:
    if job.sweeps and job.parallel:
        raise UsageError("Sweeps run in one process; find the values there, then name them to the parallel training.")
    if job.sweeps and job.resume:
        raise UsageError("A training that is resumed has its values; leave --sweep out, and name what it found.")
    if job.device and job.parallel:
        raise UsageError("With --parallel each rank takes its own GPU; leave --device out.")
    if job.tensorboard and job.work is None:
        raise UsageError("TensorBoard's events need a folder; name one with --work.")


@contextmanager
def _ranks(parallel: str | None) -> Iterator[int]:
    """This process' rank, among torchrun's where training is parallel."""
    if parallel is None:
        yield 0
        return
    if "RANK" not in os.environ:
        raise UsageError(
            f"--parallel {parallel} needs ranks; start with: torchrun --nproc-per-node N -m farskip_fused.cli"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _student(job: DistillJob, device: torch.device) -> Any:
    from farskip_fused.conversion import convert

    model = _load(job.source, device, job.dtype)
    if job.connectivity is None and job.layers is None:
        return model
    return convert(model, job.connectivity or "farskip", job.layers or "all")


def _tasks(stop_on: str) -> list[Task]:
    return function_tasks(METRIC_TASKS) if stop_on == FUNCTIONS else mbpp_tasks(Path(stop_on))


def _load(path: Path, device: torch.device, dtype: str | None) -> Any:
    """A FarSkip checkpoint by ``load``, which accounts for every tensor; a stock one by transformers."""
    from transformers import AutoModelForCausalLM

    from farskip_fused.conversion import load
    from farskip_fused.conversion.instella import is_instella
    from farskip_fused.conversion.stored import read_checkpoint

    options: dict[str, Any] = {"device_map": device, "dtype": dtype or "auto"}
    stored = read_checkpoint(path)
    if stored.is_farskip or is_instella(stored.config):
        return load(path, **options)
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **options)


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


def _sweep_table(found: Sweep) -> Table:
    table = Table(title=f"Sweep of {found.field.replace('_', ' ')}")
    for column in ("value", "training loss", ""):
        table.add_column(column, justify="right")
    for trial in found.trials:
        table.add_row(f"{trial.value:g}", f"{trial.loss:.4f}", "best" if trial is found.winner else "")
    return table


def _table(path: Path, result: dict[str, Any]) -> Table:
    table = Table(title=str(path), show_header=False)
    names = {
        "val_ce": "cross-entropy, nats a token",
        "kl": "KL to teacher, nats a token",
        "agreement": "top-1 agreement with teacher",
    }
    for key, name in names.items():
        if key in result:
            table.add_row(name, f"{result[key]:.4f}")
    for key, name in {"functions": "small functions", "human_eval": "HumanEval", "mbpp": "MBPP"}.items():
        if key in result:
            table.add_row(f"{name}, pass@1 of {result[key]['tasks']}", f"{result[key]['pass_at_1']:.1%}")
    for task, scores in result.get("lm_eval", {}).items():
        for key, value in scores.items():
            table.add_row(f"{task}, {key}", f"{value:.4f}")
    return table
