"""How to train: every option in one place, and two presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from farskip_fused.distillation.loss import CHUNK_SIZE
from farskip_fused.distillation.teacher import FORMS
from farskip_fused.errors import UsageError

OBJECTIVES = ("kl", "sft", "kl+l2")
WARMUP_STEPS = 1000


@dataclass(frozen=True)
class DistillationConfig:
    """How to train. Defaults are the paper's where it says something, for a checkpoint of billions of parameters.

    objective: "kl", FCSD's forward KL(teacher || student) per token; "sft", cross-entropy of the text; "kl+l2", the
        divergence and ``l2_weight`` times the mean over layers but the last of |o_k - teacher's o_k|^2 / |teacher's
        o_k|^2.
    teacher_form: how the teacher is kept, see ``teacher.teacher_of``.
    steps: optimizer steps; None: one pass over the data.
    batch_tokens: tokens a step, rounded down to whole blocks.
    micro_batch_tokens: tokens a forward pass; gradients of a batch are summed over its micro-batches, each token that
        counts with the same weight.
    block_length: tokens a block, where the data are not blocks already.
    answers_only: of chats and prompts only the answers count.
    learning_rate: the peak, reached by linear warm-up and left on a cosine down to ``final_learning_rate`` times it.
    warmup_steps: None: 1000, but at most a tenth of the steps.
    weight_decay: of matrices; vectors (norms, biases) have none.
    gradient_clip: largest norm of the gradient of a step.
    train_layers: the decoder layers that are trained, as ``ff.convert`` takes them; if not "all", nothing outside of
        them is.
    freeze_embeddings: leave the input embeddings as they are, and with them a head that is tied to them.
    evaluations: how often to evaluate on the validation data, at equal distances; the last time is after the last step.
    metric_every, patience, metric_drop: steps between two looks at the metric; training stops when so many looks in a
        row have found it more than ``metric_drop`` below its best, and goes back to the best weights.
    explosion: a step whose gradient's norm is so many times the median of the last ones is skipped, as one that is not
        finite is; most_skipped: training ends with the best weights when more steps in a row are.
    chunk_size: tokens whose logits exist at the same time.
    balance_rate: by how much a step moves the bias of an expert that is used too much or too little, see
        ``ExpertBalance``; 0, the default, leaves the routers' biases as they are.
    seed: of the order of the blocks and of torch's generators.
    """

    objective: str = "kl"
    teacher_form: str = "shared"
    steps: int | None = None
    batch_tokens: int = 2**16
    micro_batch_tokens: int = 2**13
    block_length: int = 1024
    answers_only: bool = True
    learning_rate: float = 2e-5
    final_learning_rate: float = 0.1
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    l2_weight: float = 1.0
    train_layers: str = "all"
    freeze_embeddings: bool = False
    evaluations: int = 1
    metric_every: int = 1000
    patience: int = 20
    metric_drop: float = 0.02
    explosion: float = 20.0
    most_skipped: int = 10
    chunk_size: int = CHUNK_SIZE
    balance_rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("objective", OBJECTIVES), ("teacher_form", FORMS)):
            if getattr(self, name) not in known:
                raise UsageError(f"Unknown {name} {getattr(self, name)!r}; use one of {', '.join(known)}.")
        positive = ["batch_tokens", "micro_batch_tokens", "learning_rate", "gradient_clip", "chunk_size"]
        positive += ["metric_every", "patience", "explosion", *(["steps"] if self.steps is not None else [])]
        for name in positive:
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be greater than 0.")
        not_negative = ["weight_decay", "final_learning_rate", "evaluations", "warmup_steps", "balance_rate"]
        for name in [*not_negative, "l2_weight", "metric_drop", "most_skipped"]:
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must not be negative.")

    def changed(self, **fields: Any) -> DistillationConfig:
        """A copy with these fields; UsageError for one that does not exist."""
        known = self.__dataclass_fields__
        unknown = sorted(fields.keys() - known.keys())
        if unknown:
            raise UsageError(f"Unknown option {', '.join(unknown)}; DistillationConfig has {', '.join(known)}.")
        return replace(self, **fields)


# arXiv 2511.11505: up to 10B tokens, 1000 steps of warm-up, 2e-5 in batches of 2^17 before its two sweeps, early
# stopping every 1000 steps. The demo's is for models of a few million parameters: everything shorter, and faster.
PRESETS = {
    "paper": DistillationConfig(steps=10 * 10**9 // 2**17, batch_tokens=2**17, warmup_steps=WARMUP_STEPS),
    "demo": DistillationConfig(
        steps=320,
        batch_tokens=1024,
        micro_batch_tokens=1024,
        block_length=128,
        learning_rate=2e-3,
        metric_every=64,
        patience=5,
    ),
}


def preset(name: str) -> DistillationConfig:
    if name not in PRESETS:
        raise UsageError(f"Unknown preset {name!r}; use one of {', '.join(PRESETS)}.")
    return PRESETS[name]
