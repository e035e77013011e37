"""Llama-4's experts, whose router scores multiply what goes into them, as transformers' other families have theirs.

transformers runs all experts on all tokens, most of them on zeros, and lets nobody choose another implementation. Here
the experts join its registry: called as ``experts(rows [N, H], indices [N, K], weights [N, K])`` they run what
``config._experts_implementation`` names, "farskip" and "grouped_mm" among them. "eager" stays transformers' own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations import moe

from farskip_fused.checks import DTYPES
from farskip_fused.conversion.rewired import Rewired
from farskip_fused.kernels.machine import INTERPRETED
from farskip_fused.transformers_experts import NAME, is_silu

STOCK_CLASS, STOCK_BLOCK = "Llama4TextExperts", "Llama4TextMoe"


class Llama4Experts(Rewired):
    """The behaviour of Llama-4's experts in the registry; what it reads of them are these attributes."""

    config: PreTrainedConfig
    has_gate, has_bias, has_post_expert_norm = True, False, False
    is_transposed, is_concatenated = True, True
    _is_expert_parallel = False
    _apply_gate = moe._default_apply_gate

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Without indices, what the stock class does."""
        if top_k_index is None:
            return cast(Tensor, super().forward(hidden_states))  # type: ignore[misc]
        chosen = moe.ALL_EXPERTS_FUNCTIONS.get_interface(self.config._experts_implementation, type(self)._eager)
        return cast(Tensor, chosen(self, hidden_states, top_k_index, top_k_weights))

    def _eager(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """All experts on all rows, zeros where a row is not routed, as the stock block does; bit-equal to it."""
        rows, hidden_size = hidden_states.shape
        num_experts = cast(Any, self).num_experts
        routed = hidden_states.new_zeros(num_experts, rows).scatter(0, top_k_index.T, 1)
        inputs = torch.where(routed[..., None] > 0, hidden_states, 0)
        outputs = self.forward(inputs.reshape(-1, hidden_size)).view(num_experts, rows, hidden_size)
        weights = top_k_weights.new_zeros(num_experts, rows).scatter(0, top_k_index.T, top_k_weights.T)
        return (outputs * weights[..., None].to(outputs.dtype)).sum(dim=0)


def enrol(experts: nn.Module, config: PreTrainedConfig) -> None:
    """Puts Llama-4's experts into the registry, to follow the choice of ``config``; others stay as they are."""
    if is_stock(experts):
        experts.__class__ = Llama4Experts.of(type(experts))
        cast(Any, experts).config = config


def dismiss(experts: nn.Module) -> None:
    """Gives enrolled experts their stock class back."""
    if isinstance(experts, Llama4Experts):
        del experts.config
        cast(Any, experts).__class__ = type(experts).stock_class


def is_stock(experts: nn.Module) -> bool:
    """Whether they are as transformers builds them."""
    return type(experts).__name__ == STOCK_CLASS and not isinstance(experts, Llama4Experts)


def split_block(block: Any, flat: Tensor) -> Tensor:
    """Routed output of a block for [N, H]: the sum of expert(score * x) over the experts of each token."""
    scores, logits = block.router(flat)
    top_k = block.router.top_k
    index = logits.topk(top_k, dim=-1).indices
    rows = (flat[:, None] * scores.gather(1, index)[..., None]).flatten(0, 1)
    # The scores are in the rows, so every row is one of its own.
    ones = torch.ones(rows.shape[0], 1, device=rows.device)
    routed: Tensor = block.experts(rows, index.reshape(-1, 1), ones)
    return routed if top_k == 1 else routed.view(-1, top_k, rows.shape[1]).sum(dim=1)


def kernels_suit(experts: Any) -> bool:
    """Whether the kernels can compute the experts where they are, and compiled, not interpreted."""
    weight = experts.down_proj
    return weight.is_cuda and not INTERPRETED and weight.dtype in DTYPES and is_silu(experts.act_fn)


def choose_kernels(model: Any) -> None:
    """The kernels for a model whose enrolled experts they suit; transformers' choice of "eager" was no choice here."""
    enrolled = [module for module in model.modules() if isinstance(module, Llama4Experts)]
    if enrolled and all(kernels_suit(experts) for experts in enrolled):
        model.set_experts_implementation(NAME)
