"""The paper's two sweeps: short trainings that differ in batch or learning rate; the lowest training loss wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import nn

from farskip_fused.distillation.config import DistillationConfig
from farskip_fused.distillation.early_stopping import Snapshot
from farskip_fused.distillation.trainer import distill
from farskip_fused.errors import UsageError

# arXiv 2511.11505: the batch at a learning rate of 2e-5, then the learning rate with that batch.
SWEPT: dict[str, tuple[str, tuple[float, ...]]] = {
    "batch": ("batch_tokens", (2**16, 2**17, 2**18)),
    "lr": ("learning_rate", (2e-5, 4e-5, 8e-5)),
}
STEPS = 2000


@dataclass(frozen=True)
class Trial:
    """value: of the swept option; loss: mean of the last tenth of the steps, infinite if training diverged."""

    value: float
    loss: float


@dataclass(frozen=True)
class Sweep:
    """field: the option of the configuration that was swept; config: the one given, with the winner's value in it."""

    field: str
    trials: list[Trial]
    config: DistillationConfig

    @property
    def winner(self) -> Trial:
        return min(self.trials, key=lambda trial: trial.loss)

    def to_dict(self) -> dict[str, Any]:
        return {"field": self.field, "trials": [vars(trial) for trial in self.trials], "winner": self.winner.value}


def sweep(
    model: nn.Module,
    data: Any,
    config: DistillationConfig,
    over: str,
    *,
    values: Sequence[float] | None = None,
    steps: int = STEPS,
    teacher: nn.Module | None = None,
    console: Console | None = None,
) -> Sweep:
    """Trains ``model`` for a few steps with each value, every time from the weights that it has, which it keeps.

    over: "batch" or "lr"; values: by default the paper's. The schedule of each trial has ``steps`` steps.
    Raises UsageError for an unknown sweep and if every trial diverges.
    """
    if over not in SWEPT:
        raise UsageError(f"Unknown sweep {over!r}; use one of {', '.join(SWEPT)}.")
    field, usual = SWEPT[over]
    before = Snapshot(model)
    before.take()
    trials = []
    for value in values or usual:
        trial = config.changed(**{field: value, "steps": steps})
        label = f"{config.objective}, {field.replace('_', ' ')} {value:g}"
        try:
            loss = distill(model, data, trial, teacher=teacher, description=label, console=console).final_loss()
        except FloatingPointError:
            loss = float("inf")
        trials.append(Trial(value, loss))
        before.restore()
    if all(trial.loss == float("inf") for trial in trials):
        raise UsageError(f"Training diverged with every {field.replace('_', ' ')} of {list(values or usual)}.")
    winner = min(trials, key=lambda trial: trial.loss)
    return Sweep(field, trials, config.changed(**{field: winner.value}))
