"""What a training did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from farskip_fused.distillation.evaluation import Evaluation


@dataclass(frozen=True)
class DistillationReport:
    """What a training did. Pairs begin with the number of tokens trained on before.

    tokens: given to the model, counted or not. losses: of every step that was taken. metrics: values of the metric.
    best_tokens: where the metric was best, which is where the weights are from; None without a metric. skipped: step,
    loss and gradient norm of steps that were not taken. stopped_early: by the metric. peak_bytes: most memory of this
    rank's GPU, None on a CPU.
    """

    objective: str
    steps: int
    tokens: int
    seconds: float
    losses: list[tuple[int, float]]
    evaluations: list[tuple[int, Evaluation]]
    metrics: list[tuple[int, float]]
    best_tokens: int | None
    skipped: list[tuple[int, float, float]]
    stopped_early: bool
    peak_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def final_loss(self) -> float:
        """Mean loss of the last tenth of the steps, by which sweeps compare."""
        last = self.losses[-max(1, round(0.1 * len(self.losses))) :]
        return sum(loss for _, loss in last) / len(last)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: pairs as lists."""
        return asdict(self) | {
            "losses": [list(pair) for pair in self.losses],
            "evaluations": [[tokens, evaluation.to_dict()] for tokens, evaluation in self.evaluations],
            "metrics": [list(pair) for pair in self.metrics],
            "skipped": [list(each) for each in self.skipped],
            "tokens_per_second": self.tokens_per_second,
        }
