"""Sizes of the expert layers that are measured, what they cost at least, and random routing for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from farskip_fused.errors import UsageError

BYTES = 2  # of a bfloat16
PRODUCTS = {"forward": 6, "forward_backward": 18}  # FLOPs of the three matrix products, over T K H I
ZIPF = 1.0


class Shape(NamedTuple):
    """Hidden size H, intermediate size I of an expert, experts E, experts of a token K."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int

    def weight_bytes(self, experts: int) -> int:
        """Of the three matrices of so many experts."""
        return experts * 3 * self.hidden * self.intermediate * BYTES

    def flops(self, tokens: int, direction: str) -> int:
        """Two a multiply-add; backward has twice the products of forward."""
        return PRODUCTS[direction] * tokens * self.top_k * self.hidden * self.intermediate

    def saved_bytes(self, tokens: int) -> int:
        """What a backward pass that repeats no matrix product needs, without indices: 2 T H + 4 T K I."""
        return (tokens * self.hidden + 2 * tokens * self.top_k * self.intermediate) * BYTES


SHAPES = {
    "deepseek-v2-lite": Shape(2048, 1408, 64, 6),
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "llama4-scout": Shape(5120, 8192, 16, 1),
    "deepseek-v3": Shape(7168, 2048, 256, 8),
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
}


def parse_shape(text: str) -> Shape:
    """A named shape, or "H,I,E,K" with K at most E; anything else raises UsageError."""
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split(",")
    if len(parts) == 4 and all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        shape = Shape(*(int(part) for part in parts))
        if shape.top_k <= shape.experts:
            return shape
    raise UsageError(
        f"Unknown shape {text!r}; use {', '.join(SHAPES)}, or hidden,intermediate,experts,top_k such as 2048,1408,64,6."
    )


def random_routing(shape: Shape, tokens: int, device: torch.device | str, skew: float = 0.0) -> tuple[Tensor, Tensor]:
    """Expert ids [T, K] int32, distinct in a row, and weights [T, K] float32 whose rows sum to 1.

    skew: exponent of a Zipf law over the experts, by which they are drawn without replacement; 0 is uniform.
    """
    popularity = -skew * torch.arange(1, shape.experts + 1, device=device).log()
    popularity = popularity[torch.randperm(shape.experts, device=device)]
    gumbel = -torch.empty(tokens, shape.experts, device=device).exponential_().log()
    index = (popularity + gumbel).topk(shape.top_k, dim=-1).indices.to(torch.int32)
    weights = torch.rand(tokens, shape.top_k, device=device) + 0.1
    return index, weights / weights.sum(dim=-1, keepdim=True)
