"""Keeping experts evenly used while a model is trained: auxiliary losses of the router, and DeepSeek-V3's bias.

The losses are unweighted scalars in float32, differentiable in the logits; multiply them by the coefficient of your
recipe. The count of tokens in them has no gradient. None of this waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from farskip_fused.errors import UsageError


def load_balancing_loss(
    logits: Tensor | Sequence[Tensor], ids: Tensor | Sequence[Tensor], attention_mask: Tensor | None = None
) -> Tensor:
    """Switch Transformer's loss (arXiv 2101.03961, equations 4 to 6) for softmax routers; K where all is even.

    logits: [T, E], or one for each layer; ids: [T, K] chosen experts, likewise. Layers are pooled before the product,
    as ``load_balancing_loss_func`` of transformers does it for Mixtral and Qwen.
    attention_mask: [batch, sequence] or [T], 0 for tokens that do not count.
    Raises UsageError unless there are logits and ids of the same layers.
    """
    layers, choices = _layers(logits), _layers(ids)
    if len(layers) != len(choices) or not layers:
        raise UsageError(f"Logits of {len(layers)} layers and ids of {len(choices)} were given; give both of each.")
    num_experts = layers[0].shape[-1]
    mask = None if attention_mask is None else attention_mask.reshape(-1)
    chosen = torch.stack([count_tokens(layer, num_experts, mask) for layer in choices]).sum(dim=0).float()
    probability = torch.stack([_masked_sum(layer.float().softmax(dim=-1), mask) for layer in layers]).sum(dim=0)
    tokens = len(layers) * (layers[0].shape[0] if mask is None else mask.float().sum())
    return num_experts * (chosen / tokens * (probability / tokens)).sum()


def sequence_balance_loss(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "sigmoid",
    ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """DeepSeek-V3's complementary sequence-wise loss (arXiv 2412.19437, equations 17 to 20), mean over the sequences.

    logits: [batch, sequence, E]. scoring: the router's, "sigmoid" or "softmax".
    ids: [batch, sequence, K] experts that count as chosen; None for the paper's, the best scores without the bias.
    attention_mask: [batch, sequence], 0 for tokens that do not count.
    Raises UsageError for logits of another shape and another scoring.
    """
    if logits.dim() != 3:
        raise UsageError(f"Logits {list(logits.shape)} were given; [batch, sequence, experts] is needed.")
    if scoring not in ("softmax", "sigmoid"):
        raise UsageError(f"Unknown scoring {scoring!r}; use 'softmax' or 'sigmoid'.")
    batch, length, num_experts = logits.shape
    scores = logits.float().sigmoid() if scoring == "sigmoid" else logits.float().softmax(dim=-1)
    shares = scores / scores.sum(dim=-1, keepdim=True)
    if ids is None:
        ids = scores.detach().topk(top_k, dim=-1).indices
    # One count for all sequences: the experts of sequence b are numbered from b * E on.
    first = torch.arange(batch, device=ids.device)[:, None, None] * num_experts
    numbered = torch.where(ids >= 0, ids + first, -1).reshape(batch * length, -1)
    mask = None if attention_mask is None else attention_mask.reshape(-1)
    chosen = count_tokens(numbered, batch * num_experts, mask).float().unflatten(0, (batch, num_experts))
    if attention_mask is None:
        tokens = torch.full((batch, 1), float(length), device=logits.device)
        mean_share = shares.mean(dim=1)
    else:
        tokens = attention_mask.float().sum(dim=1, keepdim=True).clamp_min(1.0)
        mean_share = torch.where(attention_mask[..., None] != 0, shares, 0.0).sum(dim=1) / tokens
    frequency = chosen * (num_experts / top_k) / tokens
    loss: Tensor = (frequency * mean_share).sum(dim=1).mean()
    return loss


def router_z_loss(logits: Tensor | Sequence[Tensor], attention_mask: Tensor | None = None) -> Tensor:
    """ST-MoE's z-loss (arXiv 2202.08906, equation 5): mean over tokens of the squared log of the sum of exponentials.

    logits: [T, E], or one for each layer, whose losses are averaged. attention_mask: as for ``load_balancing_loss``.
    """
    layers = _layers(logits)
    mask = None if attention_mask is None else attention_mask.reshape(-1)
    squares = [layer.float().logsumexp(dim=-1).square()[:, None] for layer in layers]
    tokens = len(layers) * (layers[0].shape[0] if mask is None else mask.float().sum())
    return torch.stack([_masked_sum(square, mask) for square in squares]).sum() / tokens


@torch.no_grad()
def count_tokens(ids: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Tokens that chose each expert: [E] int64, from ids [T, K]; -1 and tokens whose ``mask`` [T] is 0 do not count."""
    counted = ids >= 0
    if mask is not None:
        counted &= (mask != 0)[:, None]
    # What does not count goes to one place more: no shape depends on the data.
    place = torch.where(counted, ids, num_experts).flatten()
    count = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return count.index_add_(0, place, torch.ones_like(place, dtype=torch.int64))[:num_experts]


@torch.no_grad()
def update_correction_bias(
    bias: Tensor, tokens_per_expert: Tensor, rate: float, group: dist.ProcessGroup | None = None
) -> None:
    """DeepSeek-V3's balancing without a loss (arXiv 2412.19437, section 2.1.2), in place; once an optimizer step.

    bias: [E]; an expert with more than the mean of the tokens is lowered by ``rate``, one with less raised.
    tokens_per_expert: [E] tokens of this step, see ``count_tokens``. group: ranks whose tokens count too; collective.
    """
    if tokens_per_expert.shape != bias.shape:
        raise UsageError(f"Tokens of {list(tokens_per_expert.shape)} experts and a bias {list(bias.shape)} were given.")
    if group is not None:
        tokens_per_expert = tokens_per_expert.clone()
        dist.all_reduce(tokens_per_expert, group=group)
    load = tokens_per_expert.double()
    bias += (rate * torch.sign(load.mean() - load)).to(bias.dtype)


def _layers(values: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else list(values)


def _masked_sum(values: Tensor, mask: Tensor | None) -> Tensor:
    """Over the tokens of [T, N]."""
    return values.sum(dim=0) if mask is None else torch.where((mask != 0)[:, None], values, 0.0).sum(dim=0)
