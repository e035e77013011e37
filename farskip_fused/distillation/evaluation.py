"""How good a model is and how close to its teacher, on blocks of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from farskip_fused.distillation.loss import CHUNK_SIZE, log_probabilities
from farskip_fused.errors import UsageError

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Evaluation:
    """Means over all tokens that have a predecessor in their block.

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
    blocks: Tensor,
    teacher: nn.Module | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    chunk_size: int = CHUNK_SIZE,
    on_batch: Callable[[int], None] = lambda blocks: None,
) -> Evaluation:
    """Cross-entropy of a causal language model on token blocks [N, T], and its distance from a teacher.

    Model and teacher run in eval mode, each on its own device, and are left in the mode that they were in.
    on_batch: called with the number of blocks after each forward pass.
    """
    head = checked_head(model, blocks)
    teacher_head = None if teacher is None else checked_head(teacher, blocks, vocabulary=head.out_features)
    batch = max(1, batch_tokens // blocks.shape[1])
    cross_entropy = divergence = agreeing = 0.0
    with _eval_mode(model, teacher), torch.no_grad():
        for ids in blocks.split(batch):
            hidden = predicting_states(model, ids)
            taught = None if teacher is None else predicting_states(teacher, ids)
            targets = ids[:, 1:].reshape(-1, 1).to(hidden.device)
            for start in range(0, len(hidden), chunk_size):
                rows = slice(start, start + chunk_size)
                log_p = log_probabilities(hidden[rows], head)
                cross_entropy -= log_p.gather(1, targets[rows]).sum(dtype=torch.float64).item()
                if taught is not None and teacher_head is not None:
                    log_q = log_probabilities(taught[rows], teacher_head).to(log_p.device)
                    divergence += (log_q.exp() * (log_q - log_p)).sum(dtype=torch.float64).item()
                    agreeing += (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()
            on_batch(len(ids))
    tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    if teacher is None:
        return Evaluation(cross_entropy / tokens)
    return Evaluation(cross_entropy / tokens, divergence / tokens, agreeing / tokens)


def unigram_cross_entropy(training: Tensor, validation: Tensor, vocab_size: int) -> float:
    """Cross-entropy in nats a token of validation blocks [N, T] under the token frequencies of the training blocks.

    One is added to every count, so that a token unseen in training has a probability.
    """
    counts = torch.bincount(training.flatten(), minlength=vocab_size).double() + 1
    log_p = (counts / counts.sum()).log()
    return -log_p[validation[:, 1:]].mean().item()


def predicting_states(model: nn.Module, ids: Tensor) -> Tensor:
    """Final hidden states, after the last norm, of all tokens of ids [B, T] but each block's last: [B * (T-1), H]."""
    base = cast(Any, model).base_model
    if base is model:  # Llama-4 names a base that it does not have
        base = getattr(base, "language_model", base).model
    states: Tensor = base(input_ids=ids.to(base.device), use_cache=False).last_hidden_state[:, :-1]
    return states.flatten(0, 1)


def checked_head(model: nn.Module, blocks: Tensor, vocabulary: int | None = None) -> nn.Linear:
    """The output head of a causal language model that can run on ``blocks``, with logits that are the head's output.

    Raises UsageError for models that do more to their logits (scale or cap them), for ids that the model does not know,
    for blocks longer than it knows, and for a head that is not of size ``vocabulary``.
    """
    head = cast(Any, model).get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UsageError(f"The {type(model).__name__} has no linear output head; give a causal language model.")
    if vocabulary not in (None, head.out_features):
        raise UsageError(f"The teacher has a vocabulary of {head.out_features}, the model one of {vocabulary}.")
    lowest, highest = int(blocks.min()), int(blocks.max())
    known = cast(Any, model).get_input_embeddings().num_embeddings
    if lowest < 0 or highest >= known:
        raise UsageError(
            f"The data has token ids {lowest} to {highest}, the model knows 0 to {known - 1};"
            " use the model's own tokenizer."
        )
    longest = getattr(cast(Any, model).config, "max_position_embeddings", None)
    if longest is not None and blocks.shape[1] > longest:
        raise UsageError(f"Blocks of {blocks.shape[1]} tokens are longer than the model's {longest}; cut them shorter.")
    probe = blocks[:1, :8]
    with _eval_mode(model), torch.no_grad():
        logits = cast(Any, model)(input_ids=probe.to(head.weight.device), use_cache=False).logits
        expected, actual = logits[:, :-1].flatten(0, 1), head(predicting_states(model, probe))
    if not torch.allclose(actual.float(), expected.float(), rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise UsageError(f"The {type(model).__name__} changes its logits after the output head; it is not supported.")
    return head


class _eval_mode:
    """Puts models into eval mode and back."""

    def __init__(self, *models: nn.Module | None) -> None:
        self._models = [model for model in models if model is not None]

    def __enter__(self) -> None:
        self._training = [model.training for model in self._models]
        for model in self._models:
            model.eval()

    def __exit__(self, *_: object) -> None:
        for model, training in zip(self._models, self._training, strict=True):
            model.train(training)
