"""The training loop: FCSD, fine-tuning beside it, and pre-training, which differ in their loss only."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from farskip_fused.connectivity import Connectivity
from farskip_fused.distillation.balance import ExpertBalance
from farskip_fused.distillation.data import as_blocks
from farskip_fused.distillation.evaluation import Evaluation, checked_head, evaluate, predicting_states
from farskip_fused.distillation.loss import CHUNK_SIZE, cross_entropy, kl_divergence
from farskip_fused.errors import UsageError

OBJECTIVES = ("kl", "sft")
WARMUP_STEPS = 1000


@dataclass(frozen=True)
class DistillationConfig:
    """How to train. Defaults are the paper's where it says something, for a checkpoint of billions of parameters.

    objective: "kl", FCSD's forward KL(teacher || student) per token; "sft", cross-entropy of the text.
    steps: optimizer steps; None: one pass over the data.
    batch_tokens: tokens a step, rounded down to whole blocks.
    micro_batch_tokens: tokens a forward pass; gradients of a batch are summed over its micro-batches.
    block_length: tokens a block, where the data are not blocks already.
    learning_rate: the peak, reached by linear warm-up and left on a cosine down to ``final_learning_rate`` times it.
    warmup_steps: None: 1000, but at most a tenth of the steps.
    weight_decay: of matrices; vectors (norms, biases) have none.
    gradient_clip: largest norm of the gradient of a step.
    evaluations: how often to evaluate on the validation data, at equal distances; the last time is after the last step.
    chunk_size: tokens whose logits exist at the same time.
    balance_rate: by how much a step moves the bias of an expert that is used too much or too little, see
        ``ExpertBalance``; 0, the default, leaves the routers' biases as they are.
    seed: of the order of the blocks and of torch's generators.
    """

    objective: str = "kl"
    steps: int | None = None
    batch_tokens: int = 2**16
    micro_batch_tokens: int = 2**13
    block_length: int = 1024
    learning_rate: float = 2e-5
    final_learning_rate: float = 0.1
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    evaluations: int = 1
    chunk_size: int = CHUNK_SIZE
    balance_rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UsageError(f"Unknown objective {self.objective!r}; use one of {', '.join(OBJECTIVES)}.")
        positive = ("batch_tokens", "micro_batch_tokens", "learning_rate", "gradient_clip", "chunk_size")
        for name in positive if self.steps is None else (*positive, "steps"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be greater than 0.")
        for name in ("weight_decay", "final_learning_rate", "evaluations", "warmup_steps", "balance_rate"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must not be negative.")


@dataclass(frozen=True)
class DistillationReport:
    """What a training did. ``losses`` and ``evaluations`` are pairs with the number of tokens trained on before."""

    objective: str
    steps: int
    tokens: int
    seconds: float
    losses: list[tuple[int, float]]
    evaluations: list[tuple[int, Evaluation]]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON: pairs as lists."""
        return asdict(self) | {
            "losses": [list(pair) for pair in self.losses],
            "evaluations": [[tokens, evaluation.to_dict()] for tokens, evaluation in self.evaluations],
            "tokens_per_second": self.tokens_per_second,
        }


def distill(
    model: nn.Module,
    data: Any,
    config: DistillationConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    validation: Any = None,
    tokenizer: Any = None,
    description: str | None = None,
    console: Console | None = None,
    **overrides: Any,
) -> DistillationReport:
    """Trains ``model`` in place; by default FCSD, which recovers what conversion has cost a model.

    model: a causal language model of transformers, converted by ``ff.convert`` where it is to be its own teacher.
    data: a text file or a directory of them (needs ``tokenizer``), or token ids: a tensor [n] or of blocks [N, T], or
        an iterable. validation: the same, to evaluate on.
    config, overrides: a ``DistillationConfig`` and fields of it that differ: ``distill(model, data, steps=100)``.
    teacher: the model to learn from, used as it is and not changed; by default, for objective "kl", a copy of ``model``
        from before training with standard connectivity. With objective "sft" it is only compared with.
    description, console: label of the progress bar and where it is drawn.

    Raises UsageError for bad arguments, before training, and FloatingPointError for a loss or gradient that is not
    finite, with the step named and the weights of the step before.
    """
    config = replace(config or DistillationConfig(), **_known(overrides))
    blocks = as_blocks(data, config.block_length, tokenizer)
    held_out = None if validation is None else as_blocks(validation, config.block_length, tokenizer)
    head = checked_head(model, blocks)
    if teacher is not None:
        checked_head(teacher, blocks, vocabulary=head.out_features)
    with _teacher_of(model, teacher, config) as resolved:
        return _train(model, blocks, config, resolved, held_out, description or config.objective, console)


def learning_rate_factor(step: int, steps: int, warmup: int, final: float) -> float:
    """Share of the peak learning rate at optimizer step ``step`` of ``steps``, counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _train(
    model: nn.Module,
    blocks: Tensor,
    config: DistillationConfig,
    teacher: nn.Module | None,
    validation: Tensor | None,
    description: str,
    console: Console | None,
) -> DistillationReport:
    block_length = blocks.shape[1]
    batch = config.batch_tokens // block_length
    if not 0 < batch <= len(blocks):
        raise UsageError(
            f"A batch of {config.batch_tokens} tokens must hold at least one block of {block_length} and at most the"
            f" data's {blocks.numel()} tokens; change batch_tokens."
        )
    micro = max(1, config.micro_batch_tokens // block_length)
    steps = config.steps or len(blocks) // batch
    warmup = config.warmup_steps if config.warmup_steps is not None else min(WARMUP_STEPS, steps // 10)
    torch.manual_seed(config.seed)
    order = _order(len(blocks), torch.Generator().manual_seed(config.seed))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(parameters, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, warmup, config.final_learning_rate)
    )
    balancing = ExpertBalance(model, config.balance_rate) if config.balance_rate else nullcontext()
    loss_of = _objective(model, teacher, config)
    evaluate_after = _evenly(steps, config.evaluations if validation is not None else 0)
    losses: list[tuple[int, float]] = []
    evaluations: list[tuple[int, Evaluation]] = []
    was_training = model.training
    seconds = 0.0
    with _progress(console) as progress, balancing as balance:
        task = progress.add_task(description, total=steps, loss=math.nan, speed=0.0)
        for step in range(steps):
            started = time.perf_counter()
            model.train()
            ids = blocks[[next(order) for _ in range(batch)]]
            loss = 0.0
            for part in ids.split(micro):
                share = loss_of(part) * (len(part) / batch)
                share.backward()
                loss += share.item()
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                model.train(was_training)
                optimizer.zero_grad()
                raise FloatingPointError(
                    f"Step {step + 1} of {steps} has loss {loss} and gradient norm {norm} at learning rate"
                    f" {schedule.get_last_lr()[0]:.1e}; lower learning_rate or look at the data."
                )
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if balance is not None:
                balance.step()
            tokens = (step + 1) * batch * block_length
            losses.append((tokens, loss))
            seconds += time.perf_counter() - started
            if validation is not None and step + 1 in evaluate_after:
                evaluations.append((tokens, evaluate(model, validation, teacher, chunk_size=config.chunk_size)))
            progress.update(task, advance=1, loss=loss, speed=tokens / seconds)
    model.train(was_training)
    return DistillationReport(config.objective, steps, steps * batch * block_length, seconds, losses, evaluations)


def _objective(model: nn.Module, teacher: nn.Module | None, config: DistillationConfig) -> Callable[[Tensor], Tensor]:
    """The loss of a micro-batch of token ids [B, T], as a function."""
    head = cast(Any, model).get_output_embeddings()

    def sft(ids: Tensor) -> Tensor:
        hidden = predicting_states(model, ids)
        return cross_entropy(hidden, head, ids[:, 1:].flatten().to(hidden.device), config.chunk_size)

    def kl(ids: Tensor) -> Tensor:
        taught = _taught_states(cast(nn.Module, teacher), ids)
        return kl_divergence(predicting_states(model, ids), head, taught, teacher_head, config.chunk_size)

    if config.objective == "sft":
        return sft
    teacher_head = cast(Any, teacher).get_output_embeddings()
    return kl


@torch.no_grad()
def _taught_states(teacher: nn.Module, ids: Tensor) -> Tensor:
    return predicting_states(teacher, ids)


@contextmanager
def _teacher_of(model: nn.Module, given: nn.Module | None, config: DistillationConfig) -> Iterator[nn.Module | None]:
    """The teacher, in eval mode within."""
    if given is not None:
        if given is model:
            raise UsageError("The teacher is the model itself and would change with it; leave it out to have a copy.")
        was_training = given.training
        try:
            yield given.eval()
        finally:
            given.train(was_training)
    elif config.objective == "sft":
        yield None
    else:
        from farskip_fused.conversion import as_teacher, connectivity_of

        if all(connectivity == Connectivity.standard() for connectivity in connectivity_of(model)):
            raise UsageError(
                "The model has standard connectivity, so it equals its teacher; convert it with ff.convert."
            )
        with as_teacher(copy.deepcopy(model).requires_grad_(False).eval()) as teacher:
            yield teacher


def _optimizer(parameters: list[nn.Parameter], config: DistillationConfig) -> torch.optim.AdamW:
    if not parameters:
        raise UsageError("No parameter of the model requires a gradient; unfreeze what is to be trained.")
    groups = [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def _order(blocks: int, generator: torch.Generator) -> Iterator[int]:
    """Indices of blocks without end: one random permutation after the other."""
    while True:
        yield from torch.randperm(blocks, generator=generator).tolist()


def _evenly(steps: int, times: int) -> set[int]:
    return {round(steps * (index + 1) / times) for index in range(min(times, steps))}


def _known(overrides: dict[str, Any]) -> dict[str, Any]:
    fields = DistillationConfig.__dataclass_fields__
    unknown = sorted(overrides.keys() - fields.keys())
    if unknown:
        raise UsageError(f"Unknown option {', '.join(unknown)}; DistillationConfig has {', '.join(fields)}.")
    return overrides


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )
