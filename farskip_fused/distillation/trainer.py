"""The training loop: FCSD, fine-tuning beside it, and pre-training, which differ in their loss only."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from farskip_fused.distillation.balance import ExpertBalance
from farskip_fused.distillation.blocks import Blocks
from farskip_fused.distillation.config import DistillationConfig
from farskip_fused.distillation.data import as_blocks
from farskip_fused.distillation.early_stopping import EarlyStopping, Snapshot
from farskip_fused.distillation.evaluation import BATCH_TOKENS, Evaluation, evaluate
from farskip_fused.distillation.forward import checked_head, device_of, eval_mode
from farskip_fused.distillation.guard import Guard
from farskip_fused.distillation.logs import Logs, progress_bar
from farskip_fused.distillation.objective import objective
from farskip_fused.distillation.optimiser import Optimiser, choose_parameters
from farskip_fused.distillation.parallel import Parallel, Sharded, distribute, shard
from farskip_fused.distillation.report import DistillationReport
from farskip_fused.distillation.resume import Checkpoints, fingerprint, generators, numbered, set_generators
from farskip_fused.distillation.teacher import Separate, Shared, Teacher, teacher_of
from farskip_fused.errors import UsageError

Metric = Callable[[Any], float]


def distill(
    model: nn.Module,
    data: Any,
    config: DistillationConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    validation: Any = None,
    metric: Metric | None = None,
    tokenizer: Any = None,
    parallel: str | None = None,
    folder: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    description: str | None = None,
    console: Console | None = None,
    **overrides: Any,
) -> DistillationReport:
    """Trains ``model`` in place; by default FCSD, which recovers what conversion has cost a model.

    model: a causal language model of transformers, converted by ``ff.convert`` where it is to be its own teacher.
    data: see ``as_blocks``: files (need ``tokenizer``) or token ids. validation: the same, to evaluate on.
    config, overrides: a ``DistillationConfig`` and fields of it that differ: ``distill(model, data, steps=100)``.
    teacher: the model to learn from; by default, for the objectives with a divergence, ``model`` as it was before
        training with standard connectivity. With objective "sft" it is only compared with.
    metric: what early stopping looks at: from the model, in eval mode, to a number of which more is better. The weights
        in the end are those that it found best.
    parallel: under torchrun "fsdp" (FSDP2; a teacher is sharded too, in place) or "ep" (``ff.parallelize``); every rank
        calls with the same model and data. ``save_trained`` puts the model together again.
    folder: where ``log.jsonl``, TensorBoard's events if ``tensorboard``, and training states go, the latter every
        ``checkpoint_every`` steps. resume: go on from the last state there, bit for bit as if never interrupted, with
        the model, data and configuration that it began with.
    description, console: label of the progress bar and where it is drawn.

    Parameters of 16 bits are trained through float32 versions.
    Raises UsageError for bad arguments, before training, and FloatingPointError when training diverges: more steps in
    a row than ``config.most_skipped``, or all of them, were not finite or exploded; the weights are then the best ones
    that were seen.
    """
    config = (config or DistillationConfig()).changed(**overrides)
    if checkpoint_every is not None and (folder is None or checkpoint_every < 1):
        raise UsageError(f"checkpoint_every is {checkpoint_every}; it must be at least 1, with a folder to write to.")
    place = None if folder is None else Path(folder)
    if resume and place is None:
        raise UsageError("To resume, give the folder of the training.")
    if parallel == "fsdp" and config.teacher_form in ("offload", "int8"):
        raise UsageError(
            f"With fsdp the teacher is sharded, too; teacher_form {config.teacher_form!r} needs one process."
        )
    blocks = as_blocks(data, config.block_length, tokenizer, answers_only=config.answers_only)
    held_out = None
    if validation is not None:
        held_out = as_blocks(validation, config.block_length, tokenizer, answers_only=config.answers_only)
    for each in (blocks, *([] if held_out is None else [held_out])):
        head = checked_head(model, each)
        if teacher is not None:
            checked_head(teacher, each, vocabulary=head.out_features)
    with ExitStack() as stack:
        stack.enter_context(choose_parameters(model, config))
        # A copy is made of the whole model; a shared teacher of what each rank holds.
        taught_by = stack.enter_context(_separate_teacher(model, teacher, config, parallel))
        ranks = distribute(model, parallel, max(config.micro_batch_tokens, blocks.block_length))
        if isinstance(ranks, Sharded) and isinstance(taught_by, Separate):
            shard(taught_by.model, ranks.device, trained=False)
        if taught_by is None and config.objective != "sft":
            taught_by = Shared(model)
        training = _Training(model, blocks, config, taught_by, held_out, metric, ranks)
        stack.callback(training.close)
        if place is not None:
            training.keep_states_in(place, checkpoint_every, resume)
        shown = console if ranks.rank == 0 else Console(quiet=True)
        log_to = place if ranks.rank == 0 else None
        with Logs(log_to, tensorboard=tensorboard, from_step=training.progress.step) as logs:
            return training.run(logs, description or config.objective, shown)


def _separate_teacher(
    model: nn.Module, given: nn.Module | None, config: DistillationConfig, parallel: str | None
) -> AbstractContextManager[Teacher | None]:
    """The teacher, if it is a model of its own."""
    if given is None and config.objective == "sft":
        return nullcontext()
    form = config.teacher_form
    if parallel == "fsdp" and form == "shared":
        # FSDP owns the shards of what is trained; other weights cannot take their place.
        form = "copy"
    if given is None and form == "shared":
        return nullcontext()
    return teacher_of(model, given, form)


@dataclass
class _Progress:
    """Where a training stands; all of it is stored. step: steps done or skipped."""

    step: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, Evaluation]] = field(default_factory=list)
    metrics: list[tuple[int, float]] = field(default_factory=list)
    best_tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        evaluations = [[tokens, each.to_dict()] for tokens, each in self.evaluations]
        return vars(self) | {"evaluations": evaluations}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> _Progress:
        pairs = {name: [(each[0], each[1]) for each in values[name]] for name in ("losses", "metrics")}
        evaluations = [(tokens, Evaluation(**each)) for tokens, each in values["evaluations"]]
        return cls(**values | pairs | {"evaluations": evaluations})


class _Training:
    """One training: its parts, and where it stands."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        config: DistillationConfig,
        teacher: Teacher | None,
        validation: Blocks | None,
        metric: Metric | None,
        parallel: Parallel,
    ) -> None:
        self.model, self.blocks, self.config, self.teacher = model, blocks, config, teacher
        self.validation, self.metric, self.parallel = validation, metric, parallel
        self.batch = config.batch_tokens // blocks.block_length // parallel.world * parallel.world
        if not 0 < self.batch <= len(blocks):
            raise UsageError(
                f"A batch of {config.batch_tokens} tokens must hold at least one block of {blocks.block_length} for"
                f" each of {parallel.world} ranks and at most the data's {blocks.numel()} tokens; change batch_tokens."
            )
        if validation is not None:
            shared = len(validation) // parallel.world * parallel.world
            if not validation[:shared].predictions():
                raise UsageError(
                    f"In the validation data no token counts of {shared} blocks for {parallel.world} ranks; give more."
                )
        self.micro = max(1, config.micro_batch_tokens // blocks.block_length)
        self.steps = config.steps or len(blocks) // self.batch
        self.tokens_of_a_step = self.batch * blocks.block_length
        self.optimiser = Optimiser(model, config, self.steps)
        self.loss_of = objective(model, teacher, config)
        self.guard = Guard(config.explosion, config.most_skipped)
        self.stopping = EarlyStopping(config.patience, config.metric_drop)
        self.best = Snapshot(model)
        self.progress = _Progress()
        self.states: Checkpoints | None = None
        self.state_every: int | None = None
        self.was_training = model.training
        torch.manual_seed(config.seed + parallel.rank)
        if device_of(model).type == "cuda":
            torch.cuda.reset_peak_memory_stats(device_of(model))

    def close(self) -> None:
        self.optimiser.close()
        self.model.train(self.was_training)

    def keep_states_in(self, folder: Path, every: int | None, resume: bool) -> None:
        self.states = Checkpoints(
            folder, fingerprint(self.model, self.blocks, self.config, self.parallel), self.parallel
        )
        self.state_every = every
        if self.states.steps() and not resume:
            raise UsageError(f"{folder} holds states of a training; resume it, or name another folder.")
        if self.states.steps():
            self._restore(self.states)

    def run(self, logs: Logs, description: str, console: Console | None) -> DistillationReport:
        config = self.config
        evaluate_after = _evenly(self.steps, config.evaluations if self.validation is not None else 0)
        order = itertools.islice(_order(len(self.blocks), config.seed), self.progress.step * self.batch, None)
        balancing = ExpertBalance(self.model, config.balance_rate) if config.balance_rate else nullcontext()
        with progress_bar(console) as bar, balancing as balance:
            task = bar.add_task(description, total=self.steps, completed=self.progress.step, loss=math.nan, speed=0.0,
                                memory="")  # fmt: skip
            while self.progress.step < self.steps and not self._stops:
                batch = self.blocks[list(itertools.islice(order, self.batch))]
                loss = self._step(batch, logs)
                if balance is not None:
                    balance.step(self.parallel)
                step = self.progress.step
                if step in evaluate_after:
                    self._evaluate(logs)
                if self.metric is not None and (step % config.metric_every == 0 or step == self.steps):
                    self._look(logs)
                if self.states is not None and self.state_every is not None and step % self.state_every == 0:
                    self._save(self.states)
                speed = self.tokens / self.progress.seconds
                bar.update(task, advance=1, loss=loss, speed=speed, memory=_memory(self._peak()))
        if not self.progress.losses:
            self._give_up()
        if self.metric is not None and self.best.tensors:
            self.best.restore()
        return self._report()

    @property
    def _stops(self) -> bool:
        return self.metric is not None and self.stopping.stops

    @property
    def tokens(self) -> int:
        return self.progress.step * self.tokens_of_a_step

    def _step(self, batch: Blocks, logs: Logs) -> float:
        """One optimizer step, taken or skipped; returns its loss."""
        started = time.perf_counter()
        step, progress = self.progress.step, self.progress
        self.model.train()
        total = max(1, batch.predictions())
        loss = 0.0
        for part in self.parallel.share(batch).split(self.micro):
            share = self.loss_of(part) * (part.predictions() / total)
            (share * self.parallel.loss_scale).backward()
            loss += share.item()
        (loss,) = self.parallel.sum([loss])
        norm = self.optimiser.gradient_norm(self.parallel)
        progress.step += 1
        if self.guard.permits(progress.step, loss, norm):
            self.optimiser.step(step, norm)
            progress.losses.append((self.tokens, loss))
        else:
            self.optimiser.clear()
            logs.write("skipped", progress.step, self.tokens, {"loss": loss, "norm": norm})
            if self.guard.diverged:
                self._give_up()
        progress.seconds += time.perf_counter() - started
        values = {"loss": loss, "gradient_norm": norm, "learning_rate": self.optimiser.learning_rate(step)}
        speed = {"tokens_per_second": self.tokens / progress.seconds}
        memory = {} if self._peak() is None else {"peak_bytes": self._peak()}
        logs.write("step", progress.step, self.tokens, values | speed | memory)
        return loss

    def _give_up(self) -> None:
        step, loss, norm = self.guard.skipped[-1]
        where = "those of the last step that was taken"
        if self.best.tensors:
            self.best.restore()
            where = "the best that were evaluated"
        raise FloatingPointError(
            f"Training diverged: {self.guard.in_a_row} steps in a row up to {step} of {self.steps} were skipped, the"
            f" last with loss {loss} and gradient norm {norm}; lower learning_rate or look at the data. The weights are"
            f" {where}."
        )

    def _evaluate(self, logs: Logs) -> None:
        assert self.validation is not None
        found = evaluate(
            self.model,
            self.validation,
            self.teacher,
            batch_tokens=min(BATCH_TOKENS, self.config.micro_batch_tokens),
            chunk_size=self.config.chunk_size,
            parallel=self.parallel,
        )
        self.progress.evaluations.append((self.tokens, found))
        logs.write("evaluation", self.progress.step, self.tokens, found.to_dict())
        # Without a metric the best weights are there for a training that diverges.
        if self.metric is None and self.stopping.is_best(-(found.val_ce if found.kl is None else found.kl)):
            self.best.take()

    def _look(self, logs: Logs) -> None:
        assert self.metric is not None
        with eval_mode(self.model):
            value = float(self.metric(self.model))
        # Of all ranks the first one's: they must take and restore the same best.
        (value,) = self.parallel.sum([value if self.parallel.rank == 0 else 0.0])
        self.progress.metrics.append((self.tokens, value))
        logs.write("metric", self.progress.step, self.tokens, {"value": value, "best": max(value, self.stopping.best)})
        if self.stopping.is_best(value):
            self.best.take()
            self.progress.best_tokens = self.tokens

    def _peak(self) -> int | None:
        device = device_of(self.model)
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

    def _report(self) -> DistillationReport:
        progress = self.progress
        return DistillationReport(
            self.config.objective, progress.step, self.tokens, progress.seconds, progress.losses, progress.evaluations,
            progress.metrics, progress.best_tokens, self.guard.skipped, self._stops, self._peak(),
        )  # fmt: skip

    def _tensors(self) -> dict[str, Any]:
        """All that a state consists of; loading fills these very tensors."""
        names = {each.name: self.parallel.key(each.parameter, each.name) for each in self.optimiser.trained}
        rank = f"rank{self.parallel.rank}"
        return {
            "trained": {names[name]: state for name, state in self.optimiser.state().items()},
            "buffers": dict(self.model.named_buffers()),
            "generators": {rank: generators(device_of(self.model))},
            "best": {rank: numbered(self.best.tensors)},
        }

    def _save(self, states: Checkpoints) -> None:
        guard = {"norms": self.guard.norms, "skipped": self.guard.skipped, "in_a_row": self.guard.in_a_row}
        stopping = {"best": self.stopping.best, "below": self.stopping.below}
        record = {"progress": self.progress.to_dict(), "guard": guard, "stopping": stopping}
        states.save(self.progress.step, self._tensors(), record | {"has_best": bool(self.best.tensors)})

    def _restore(self, states: Checkpoints) -> None:
        record = states.progress()
        if record["has_best"]:
            self.best.take()  # tensors to load into
        tensors = self._tensors()
        states.load(tensors)
        self.optimiser.round()
        set_generators(tensors["generators"][f"rank{self.parallel.rank}"], device_of(self.model))
        self.progress = _Progress.from_dict(record["progress"])
        skipped = [(each[0], each[1], each[2]) for each in record["guard"].pop("skipped")]
        self.guard = Guard(self.config.explosion, self.config.most_skipped, skipped=skipped, **record["guard"])
        self.stopping = EarlyStopping(self.config.patience, self.config.metric_drop, **record["stopping"])


def _order(blocks: int, seed: int) -> Iterator[int]:
    """Indices of blocks without end: one random permutation after the other."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(blocks, generator=generator).tolist()


def _evenly(steps: int, times: int) -> set[int]:
    return {round(steps * (index + 1) / times) for index in range(min(times, steps))}


def _memory(peak: int | None) -> str:
    return "" if peak is None else f", {peak / 2**30:.1f} GiB"
