"""Block sizes of the expert GEMMs, and how a program finds its rows.

The layout lists row tiles: each belongs to one expert, and only its last may be partial. No host knows how many there
are, so grids cover the worst case and a program past the last tile ends at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .machine import INTERPRETED


@dataclass(frozen=True)
class Tile:
    """Block sizes of a GEMM: rows, columns, depth of a step; and how it is launched."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


class Choice(NamedTuple):
    """Measured block sizes of the forward GEMMs over one layout, in place of what the functions below choose.

    up, down: columns, depth, warps and stages of the two in plain Triton. sorted_copy: whether Hopper's up-projection
    reads a sorted copy of the rows instead of gathering them.
    """

    tile_rows: int
    up: tuple[int, int, int, int]
    down: tuple[int, int, int, int]
    sorted_copy: bool


def choose_tile_rows(entries: int, num_experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile, for all GEMMs over one layout.

    entries: T * K. A tile taller than an expert's share of the entries multiplies rows that are not there.
    """
    if INTERPRETED:
        return 32  # a step costs the interpreter the same, whatever its size
    if dtype == torch.float32:
        return 64
    share = entries / num_experts
    return 16 if share <= 16 else 32 if share <= 32 else 64 if share <= 64 else 128


def choose_tile(rows: int, dtype: torch.dtype, measured: tuple[int, int, int, int] | None = None) -> Tile:
    """Columns and depth that go with that many rows; the stages fit in the shared memory of sm_80 and later.

    rows: of the layout's tiles; a dot has at least 16. measured: of a ``Choice``, which comes first.
    """
    rows = max(rows, 16)
    if measured is not None:
        return Tile(rows, *measured)
    if INTERPRETED:
        return Tile(rows, 128, 128, 4, 1)
    if dtype == torch.float32:
        return Tile(rows, 64, 32, 4, 2)
    if rows <= 32:
        return Tile(rows, 64, 128, 4, 4)
    return Tile(rows, 128, 64, 8 if rows == 128 else 4, 3)


@triton.jit
def locate_tile(tiles, tile_count, tile, TILE_ROWS: tl.constexpr, NUM_EXPERTS: tl.constexpr = 0):
    """Whether the row tile exists, its expert, and its places [start, end) in the sorted order.

    Unsorted entries have no ``tile_count``, and their ids for ``tiles``: those out of NUM_EXPERTS have no tile.
    """
    if tile_count is None:
        expert = tl.load(tiles + tile)
        exists = (expert >= 0) & (expert < NUM_EXPERTS)
        start = tile
        end = tile + 1
    else:
        exists = tile < tl.load(tile_count)
        entry = tiles + tile * 4
        expert = tl.load(entry, mask=exists, other=0)
        first_tile = tl.load(entry + 1, mask=exists, other=0)
        start = tl.load(entry + 2, mask=exists, other=0) + (tile - first_tile) * TILE_ROWS
        end = tl.load(entry + 3, mask=exists, other=0)
    return exists, expert.to(tl.int64), start, end


def precision(dtype: torch.dtype) -> str:
    """float32 is computed as float32: tf32 would cost ten bits that its users asked for."""
    return "ieee" if dtype == torch.float32 else "tf32"
