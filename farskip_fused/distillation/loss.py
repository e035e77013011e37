"""Losses on final hidden states and output heads, a chunk of tokens at a time.

A batch's logits are the largest tensor of distillation (vocabulary times tokens, several copies), so they never exist
for more than a chunk. Gradients with respect to the logits have closed forms, so each chunk's backward is done in the
forward pass and only gradients of the hidden states and of the head are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_SIZE = 1024

# From the student's log-probabilities [n, V] of the tokens in a slice: the summed loss and d loss / d logits [n, V].
ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def log_probabilities(hidden: Tensor, head: nn.Linear) -> Tensor:
    """Log-softmax of the head's logits, at least float32, for hidden states [n, H]: [n, V]."""
    return F.log_softmax(_at_least_float32(F.linear(hidden, head.weight, head.bias)), dim=-1)


def kl_divergence(
    student_hidden: Tensor,
    student_head: nn.Linear,
    teacher_hidden: Tensor,
    teacher_head: nn.Linear,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Mean over tokens of the forward divergence KL(teacher || student), in nats; 0 where both agree.

    student_hidden [N, H], teacher_hidden [N, H']: final hidden states, after the last norm, of the same N tokens. To
    leave tokens out, leave out their rows. The heads share one vocabulary. The teacher gets no gradient.
    """

    def divergence(student: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        teacher = log_probabilities(teacher_hidden[rows], teacher_head).to(student.device)
        probabilities = teacher.exp()
        loss = (probabilities * (teacher - student)).sum(dtype=torch.float64)
        return loss, student.exp() - probabilities

    return _mean_over_tokens(student_hidden, student_head, chunk_size, divergence)


def cross_entropy(hidden: Tensor, head: nn.Linear, targets: Tensor, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """Mean over tokens of the cross-entropy, in nats, of targets [N] (int64) under the head on hidden states [N, H]."""

    def surprise(log_p: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        wanted = targets[rows, None]
        loss = -log_p.gather(1, wanted).sum(dtype=torch.float64)
        probabilities = log_p.exp()
        return loss, probabilities.scatter_add(1, wanted, torch.full_like(wanted, -1, dtype=log_p.dtype))

    return _mean_over_tokens(hidden, head, chunk_size, surprise)


def _mean_over_tokens(hidden: Tensor, head: nn.Linear, chunk_size: int, chunk_loss: ChunkLoss) -> Tensor:
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
        tokens = hidden.shape[0]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Summed over many chunks: kept in the accumulation type until the end.
        grad_weight = torch.zeros_like(_at_least_float32(weight)) if wants_weight else None
        grad_bias = torch.zeros_like(_at_least_float32(bias)) if wants_bias and bias is not None else None
        for start in range(0, tokens, chunk_size):
            rows = slice(start, min(start + chunk_size, tokens))
            log_p = F.log_softmax(_at_least_float32(F.linear(hidden[rows], weight, bias)), dim=-1)
            part, grad_logits = chunk_loss(log_p, rows)
            loss += part
            grad_logits /= tokens
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits.to(weight.dtype) @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.to(hidden.dtype).T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.save_for_backward(*cast(tuple[Tensor, ...], gradients))
        return (loss / tokens).to(_at_least_float32(hidden[:0]).dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        scaled = [None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors]
        return (*scaled, None, None)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
