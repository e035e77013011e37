"""Sizes of the expert layers that are measured, what they cost at least, random routing, and the routes of rows."""

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


class Routes(NamedTuple):
    """Where this rank's rows go and what comes here; S rows leave, R arrive.

    order: [S] int64 token of each row that leaves, by rank, then by token. sent, received: rows to and from each rank.
    places: [T, ranks] int64, which of the rows that leave is a token's at a rank; S where none is.
    ids: [R, K] int32 local experts of each row that arrives, by sender, then by token; -1 for those elsewhere.
    """

    order: Tensor
    places: Tensor
    sent: list[int]
    received: list[int]
    ids: Tensor

    @staticmethod
    def of(all_ids: Tensor, rank: int, local: int) -> Routes:
        """all_ids: [ranks, T, K] expert ids of all tokens; ``local`` experts a rank."""
        world, tokens, _ = all_ids.shape
        owners = all_ids // local
        wanted = torch.stack([(owners[rank] == receiver).any(1) for receiver in range(world)])
        order = wanted.nonzero()[:, 1].contiguous()
        places = torch.full((world, tokens), len(order))
        places[wanted] = torch.arange(len(order))
        here = torch.where(owners == rank, all_ids % local, -1)
        arriving = (owners == rank).any(2)
        return Routes(
            order, places.T.contiguous(), wanted.sum(1).tolist(), arriving.sum(1).tolist(), here[arriving].int()
        )

    def to(self, device: torch.device) -> Routes:
        return Routes(self.order.to(device), self.places.to(device), self.sent, self.received, self.ids.to(device))

    def sum_at_owner(self, returned: Tensor) -> Tensor:
        """[T, .], the sum of each token's rows among ``returned``, of S + 1 rows or more, of which S are of tokens."""
        # The fastest gather and sum that is one kernel of torch's; index_add_ would need atomics.
        return torch.nn.functional.embedding_bag(self.places, returned, mode="sum", padding_idx=len(self.order))
