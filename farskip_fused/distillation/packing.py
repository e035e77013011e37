"""Documents of any length into blocks of one length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from farskip_fused.distillation.blocks import Blocks
from farskip_fused.errors import UsageError

# Blocks that are still being filled. More of them leave less padding and keep the order of the data less well.
OPEN_BLOCKS = 64


class Encoded(NamedTuple):
    """One document as token ids, and which of them count as predictions."""

    ids: list[int]
    counted: list[bool]


def cut(ids: Tensor, block_length: int) -> Tensor:
    """Token ids [n] as blocks [N, block_length]; what does not fill the last block is left out."""
    check_length(block_length)
    blocks = ids.numel() // block_length
    if blocks == 0:
        raise UsageError(f"The data has {ids.numel()} tokens, less than one block of {block_length}; give more.")
    return ids[: blocks * block_length].view(blocks, block_length)


def stream(documents: Sequence[Encoded], block_length: int) -> Blocks:
    """Documents one after the other, cut where a block ends; what follows the cut is a document of its own."""
    ids = cut(_joined([document.ids for document in documents], torch.int64), block_length)
    counted = cut(_joined([document.counted for document in documents], torch.bool), block_length).clone()
    starts = torch.zeros(sum(len(document.ids) for document in documents), dtype=torch.bool)
    starts[torch.tensor([0] + [len(document.ids) for document in documents[:-1]]).cumsum(0)] = True
    begins = cut(starts, block_length).clone()
    begins[:, 0] = True
    counted &= ~begins
    place = torch.arange(block_length).expand_as(ids)
    return Blocks(ids, place - torch.where(begins, place, 0).cummax(dim=1).values, counted)


def pack(documents: Iterable[Encoded], block_length: int, padding: int) -> Blocks:
    """Documents whole, several in a block, first fit; the end of a block is padding that counts nowhere.

    Those longer than a block are cut to its length.
    """
    check_length(block_length)
    full: list[list[Encoded]] = []
    filling: list[tuple[int, list[Encoded]]] = []  # tokens so far, documents
    for document in documents:
        piece = Encoded(document.ids[:block_length], document.counted[:block_length])
        fits = next((i for i, (used, _) in enumerate(filling) if used + len(piece.ids) <= block_length), None)
        if fits is None:
            filling.append((len(piece.ids), [piece]))
        else:
            used, pieces = filling[fits]
            filling[fits] = (used + len(piece.ids), [*pieces, piece])
        if len(filling) > OPEN_BLOCKS:
            fullest = max(range(len(filling)), key=lambda i: filling[i][0])
            full.append(filling.pop(fullest)[1])
    full += [pieces for _, pieces in filling]
    if not full:
        raise UsageError("The data holds no documents; give some.")
    shape = (len(full), block_length)
    ids, counted = torch.full(shape, padding), torch.zeros(shape, dtype=torch.bool)
    positions = torch.zeros(shape, dtype=torch.int64)
    for row, pieces in enumerate(full):
        at = 0
        for piece in pieces:
            end = at + len(piece.ids)
            ids[row, at:end] = torch.tensor(piece.ids)
            counted[row, at + 1 : end] = torch.tensor(piece.counted[1:], dtype=torch.bool)
            positions[row, at:end] = torch.arange(end - at)
            at = end
        positions[row, at:] = torch.arange(block_length - at)
    return Blocks(ids, positions, counted)


def check_length(block_length: int) -> None:
    if block_length < 2:
        raise UsageError(f"Blocks of {block_length} tokens were asked for; 2 are needed to predict one from another.")


def _joined(lists: Iterable[Sequence[int]], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.tensor(each, dtype=dtype) for each in lists])
