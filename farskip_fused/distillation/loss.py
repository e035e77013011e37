"""Losses on final hidden states and output heads, a chunk of tokens at a time.

A batch's logits are the largest tensor of distillation (vocabulary times tokens, several copies), so they never exist
for more than a chunk. Gradients with respect to the logits have closed forms, so each chunk's backward is done in the
forward pass and only gradients of the hidden states and of the head are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SIZE = 512
# Entries of the vocabulary whose product with a chunk's states exists at the same time, on its way to the gradient.
SLICE = 2**14


class Head(Protocol):
    """What maps final hidden states [n, H] to logits [n, V]: weight [V, H], bias [V] or None."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...


# From the student's log-probabilities [n, V] of the tokens in a slice, which it may overwrite: the summed loss and
# d loss / d logits [n, V].
ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def log_probabilities(hidden: Tensor, head: Head) -> Tensor:
    """Log-softmax of the head's logits, at least float32, for hidden states [n, H]: [n, V]."""
    return _log_softmax(F.linear(hidden, head.weight, head.bias))


def kl_divergence(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Mean over tokens of the forward divergence KL(teacher || student), in nats; 0 where both agree.

    student_hidden [N, H], teacher_hidden [N, H']: final hidden states, after the last norm, of the same N tokens. To
    leave tokens out, leave out their rows. The heads share one vocabulary. The teacher gets no gradient.
    """

    def divergence(student: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        teacher = log_probabilities(teacher_hidden[rows], teacher_head).to(student.device)
        probabilities = teacher.exp()
        # Wide from rows on only: a GPU would copy all of the slice to float64 first.
        loss = teacher.sub_(student).mul_(probabilities).sum(-1).sum(dtype=torch.float64)
        return loss, student.exp_().sub_(probabilities)

    return _mean_over_tokens(student_hidden, student_head, chunk_size, divergence)


def cross_entropy(hidden: Tensor, head: Head, targets: Tensor, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """Mean over tokens of the cross-entropy, in nats, of targets [N] (int64) under the head on hidden states [N, H]."""

    def surprise(log_p: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        wanted = targets[rows, None]
        loss = -log_p.gather(1, wanted).sum(dtype=torch.float64)
        return loss, log_p.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=log_p.dtype))

    return _mean_over_tokens(hidden, head, chunk_size, surprise)


def _mean_over_tokens(hidden: Tensor, head: Head, chunk_size: int, chunk_loss: ChunkLoss) -> Tensor:
    total: Tensor = _ChunkedLoss.apply(hidden, head.weight, head.bias, chunk_size, chunk_loss)
    return total


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk_size: int,
        chunk_loss: ChunkLoss,
    ) -> Tensor:
        tokens = max(1, hidden.shape[0])
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Summed over many chunks: kept in the accumulation type until the end.
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight)) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_wide(bias)) if wants_bias and bias is not None else None
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, min(start + chunk_size, hidden.shape[0]))
            log_p = _log_softmax(F.linear(hidden[rows], weight, bias))
            part, grad_logits = chunk_loss(log_p, rows)
            loss += part
            grad_logits /= tokens
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits.to(weight.dtype) @ weight
            if grad_weight is not None:
                for first in range(0, len(weight), SLICE):
                    entries = slice(first, first + SLICE)
                    grad_weight[entries] += grad_logits[:, entries].to(hidden.dtype).T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            del log_p, grad_logits
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None and bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        ctx.save_for_backward(*cast(tuple[Tensor, ...], (grad_hidden, grad_weight, grad_bias)))
        return (loss / tokens).to(_wide(hidden))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        # In place: nobody else has these, and a graph is walked once.
        scaled = [None if saved is None else saved.mul_(grad.to(saved.dtype)) for saved in ctx.saved_tensors]
        return (*scaled, None, None)


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=_wide(logits))


def _wide(tensor: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)
