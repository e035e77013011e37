"""Blocks of token ids: what models are trained and evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Token ids that are seen together, and which of them count.

    ids: [N, T], int64. positions: [N, T], each token's place in its document, from 0 at the first one of a document in
    a block: attention then stays within documents; None if a block is one text. counted: [N, T], bool: the tokens whose
    prediction counts; None for all of them that have a predecessor in their block.
    """

    ids: Tensor
    positions: Tensor | None = None
    counted: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Sequence[int]) -> Blocks:
        positions, counted = (None if each is None else each[rows] for each in (self.positions, self.counted))
        return Blocks(self.ids[rows], positions, counted)

    @property
    def block_length(self) -> int:
        return self.ids.shape[1]

    def numel(self) -> int:
        """Tokens, counted or not."""
        return self.ids.numel()

    def split(self, blocks: int) -> list[Blocks]:
        """Parts of so many blocks; the last one has what is left."""
        return [self[start : start + blocks] for start in range(0, len(self), blocks)]

    def predictions(self) -> int:
        """How many tokens are predicted and count, M."""
        return (self.ids[:, 1:]).numel() if self.counted is None else int(self.counted[:, 1:].sum())

    def targets(self) -> Tensor:
        """The tokens that are predicted and count, in order: [M]."""
        return self.of_predictions(self.ids[:, 1:])

    def of_predictions(self, values: Tensor) -> Tensor:
        """The rows of [N, T-1, ...] that belong to the M counted predictions: [M, ...]."""
        return values.flatten(0, 1) if self.counted is None else values[self.counted[:, 1:].to(values.device)]


def model_inputs(blocks: Blocks, device: torch.device) -> dict[str, Any]:
    """What a causal language model is called with. transformers masks attention by positions that start again."""
    inputs: dict[str, Any] = {"input_ids": blocks.ids.to(device), "use_cache": False}
    if blocks.positions is not None:
        inputs["position_ids"] = blocks.positions.to(device)
    return inputs
