"""How good a model is and how close to its teacher, on blocks of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from farskip_fused.distillation.blocks import Blocks
from farskip_fused.distillation.forward import at_head, checked_head, eval_mode
from farskip_fused.distillation.loss import CHUNK_SIZE, Head, log_probabilities
from farskip_fused.distillation.parallel import Parallel
from farskip_fused.distillation.teacher import Separate, Teacher
from farskip_fused.errors import UsageError

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Evaluation:
    """Means over all tokens that count; by default those that have a predecessor in their block.

    val_ce: cross-entropy in nats a token; kl: KL(teacher || model) in nats a token; agreement: share of tokens for
    which model and teacher find the same token most likely. The last two are None without a teacher.
    """

    val_ce: float
    kl: float | None = None
    agreement: float | None = None

    def to_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def evaluate(
    model: nn.Module,
    blocks: Tensor | Blocks,
    teacher: nn.Module | Teacher | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    chunk_size: int = CHUNK_SIZE,
    parallel: Parallel | None = None,
    on_batch: Callable[[int], None] = lambda blocks: None,
) -> Evaluation:
    """Cross-entropy of a causal language model on token blocks [N, T], and its distance from a teacher.

    Model and teacher run in eval mode, each on its own device, and are left in the mode that they were in.
    parallel: how the model is split over ranks, each of which then takes a share of the blocks; collective.
    on_batch: called with the number of blocks after each forward pass.
    """
    rows, ranks = blocks if isinstance(blocks, Blocks) else Blocks(blocks), parallel or Parallel()
    if not rows.predictions():
        raise UsageError("No token of the blocks counts, so there is nothing to evaluate.")
    head = checked_head(model, rows)
    if isinstance(teacher, nn.Module):
        checked_head(teacher, rows, vocabulary=head.out_features)
        teacher = Separate(teacher)
    sums = torch.zeros(4, dtype=torch.float64)  # cross-entropy, divergence, agreement, tokens
    with eval_mode(model), torch.no_grad():
        for part in ranks.share(rows).split(max(1, batch_tokens // rows.block_length)):
            taught = None if teacher is None else teacher.teach(part).hidden
            at_head(model, part, lambda hidden: _add(sums, part, hidden, head, taught, teacher, chunk_size))  # noqa: B023
            on_batch(len(part))
    cross_entropy, divergence, agreeing, total = ranks.sum(sums.tolist())
    if teacher is None:
        return Evaluation(cross_entropy / total)
    return Evaluation(cross_entropy / total, divergence / total, agreeing / total)


def _add(
    sums: Tensor,
    blocks: Blocks,
    hidden: Tensor,
    head: Head,
    taught: Tensor | None,
    teacher: Teacher | None,
    chunk_size: int,
) -> Tensor:
    """Adds what a batch's hidden states [M, H] say to ``sums``."""
    targets = blocks.targets()[:, None].to(hidden.device)
    sums[3] += len(targets)
    for start in range(0, len(hidden), chunk_size):
        chunk = slice(start, start + chunk_size)
        log_p = log_probabilities(hidden[chunk], head)
        sums[0] -= log_p.gather(1, targets[chunk]).sum(dtype=torch.float64).item()
        if taught is not None and teacher is not None:
            log_q = log_probabilities(taught[chunk], teacher.head).to(log_p.device)
            sums[1] += (log_q.exp() * (log_q - log_p)).sum(dtype=torch.float64).item()
            sums[2] += (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()
    return hidden


def unigram_cross_entropy(training: Tensor, validation: Tensor, vocab_size: int) -> float:
    """Cross-entropy in nats a token of validation blocks [N, T] under the token frequencies of the training blocks.

    One is added to every count, so that a token unseen in training has a probability.
    """
    counts = torch.bincount(training.flatten(), minlength=vocab_size).double() + 1
    log_p = (counts / counts.sum()).log()
    return -log_p[validation[:, 1:]].mean().item()
