"""Plain torch definitions of what the kernels compute: any device and dtype, differentiable; the tests' oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Weighted sum of SwiGLU experts.

    hidden_states [T, H]; top_k_index [T, K], -1 for not routed; top_k_weights [T, K]; w13 [E, 2I, H]; w2 [E, H, I].
    """
    result = torch.zeros_like(hidden_states)
    for expert in range(w13.shape[0]):
        token, position = (top_k_index == expert).nonzero(as_tuple=True)
        gate, up = (hidden_states[token] @ w13[expert].T).chunk(2, dim=-1)
        output = (torch.nn.functional.silu(gate) * up) @ w2[expert].T
        result = result.index_add(0, token, output * top_k_weights[token, position, None].to(output.dtype))
    return result


def route(
    logits: Tensor,
    top_k: int,
    *,
    sigmoid: bool,
    normalise: bool,
    scaling: float,
    groups: int = 1,
    top_groups: int = 1,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Top-k expert ids and weights [T, K] from logits [T, E]; see ``kernels/routing.py``."""
    scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
    choice = scores.detach() if bias is None else scores.detach() + bias
    if top_groups < groups:
        members = choice.unflatten(1, (groups, -1))
        ranked = members.topk(min(2, members.shape[-1]) if sigmoid else 1, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(ranked).scatter(1, ranked.topk(top_groups, dim=-1).indices, 1).bool()
        choice = members.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    index = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, index)
    if normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return index, weights * scaling
