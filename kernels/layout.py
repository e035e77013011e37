"""Which row goes where, decided on the device without asking the host.

The (row, top-k position) entries of each expert stand together, in order of row and position: a function of the routing
alone, so results do not depend on timing.

It takes two launches. The first counts what every block of the input holds for every expert; in the second each block
sums the counts of the blocks before it, and so knows where its own entries start. The first can be part of the router
(routing.py) or of taking routing out of a slot (dispatch.py), and a layout of few entries needs one program and no
first launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launchable import Kernel
from .machine import ceil_div, padded
from .protocol import CODE_TOO_MANY_ENTRIES, fail

SINGLE_PROGRAM_ENTRIES = 2048
# Every block of the second launch reads the counts of all blocks: more of them would read more than they sort.
MAXIMUM_BLOCKS = 128
SMALLEST_CHUNK = 256  # no fewer than a program's threads
LARGEST_CHUNK = 1024
OUT_OF_RANGE = tl.constexpr(-2)  # a place


class Layout(NamedTuple):
    """Entries sorted by expert, and the row tiles of the GEMMs over them.

    An entry is a (row, top-k position) pair whose expert is local, numbered row * K + position. C is the capacity.
    order: [C] int32 entries by expert, then by number; undefined past the last.
    places: [R, K] int32 where each entry stands in ``order``, -1 where it is not routed to a local expert, -2 where its
        id is out of range: what is summed over such an entry is NaN.
    offsets: [E + 1] int32 first place of each expert; the last is the number of entries.
    tiles: [M, 4] int32, for each row tile its expert, that expert's first tile, first place and end; undefined past
    ``tile_count`` [1] int32. tile_rows: rows of a tile.
    Unsorted entries have one tile each, of one row, and their ids for all of these; see ``unsorted_layout``.
    """

    order: Tensor
    places: Tensor
    offsets: Tensor
    tiles: Tensor
    tile_count: Tensor
    tile_rows: int

    @property
    def is_sorted(self) -> bool:
        return self.tile_rows > 1


@triton.jit
def _load_experts(experts, entry, end, NUM_EXPERTS: tl.constexpr, expert_map=None, map_size=0):
    """Expert of each entry before ``end``; -1 for none, -2 for ids out of range, of the map where there is one."""
    expert = tl.load(experts + entry, mask=entry < end, other=-1)
    if expert_map is not None:
        mapped = (expert >= 0) & (expert < map_size)
        found = tl.load(expert_map + expert, mask=mapped, other=-1)
        expert = tl.where(mapped, found, tl.where(expert == -1, -1, NUM_EXPERTS))
    return tl.where((expert >= -1) & (expert < NUM_EXPERTS), expert, OUT_OF_RANGE).to(tl.int32)


@triton.jit
def count_entries(
    experts, first, end, NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, CHUNK: tl.constexpr,
    expert_map=None, map_size=0,
):  # fmt: skip
    """How many of the entries [first, end) each expert has: [EXPERTS_PADDED]."""
    counts = tl.zeros((EXPERTS_PADDED,), tl.int32)
    for start in range(first, end, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        expert = _load_experts(experts, entry, end, NUM_EXPERTS, expert_map, map_size)
        counts += tl.histogram(tl.maximum(expert, 0), EXPERTS_PADDED, mask=expert >= 0)
    return counts


@triton.jit
def write_tiles(
    counts, offsets, tiles, tile_count, block, blocks,
    NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """From the entries of each expert to offsets and row tiles, written in shares; returns where each expert starts."""
    expert = tl.arange(0, EXPERTS_PADDED)
    ends = tl.cumsum(counts)
    starts = ends - counts
    expert_tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    first_tile = tl.cumsum(expert_tiles) - expert_tiles
    if block == 0:
        tl.store(offsets, 0)
        tl.store(offsets + 1 + expert, ends, mask=expert < NUM_EXPERTS)
        tl.store(tile_count, tl.sum(expert_tiles))
    # The n-th tile of all experts at once: however skewed the counts, every block writes its share.
    for number in range(block, tl.max(expert_tiles), blocks):
        exists = number < expert_tiles
        tile = tiles + (first_tile + number) * 4
        tl.store(tile, expert, mask=exists)
        tl.store(tile + 1, first_tile, mask=exists)
        tl.store(tile + 2, starts, mask=exists)
        tl.store(tile + 3, ends, mask=exists)
    return starts


@triton.jit
def place_entries(
    experts, order, places, starts, first, routed_end, end,
    NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, CHUNK: tl.constexpr, expert_map=None, map_size=0,
):  # fmt: skip
    """Sort the entries [first, end), none of which is routed from ``routed_end`` on, to ``starts`` of their experts."""
    lane = tl.arange(0, CHUNK)
    for chunk in range(first, end, CHUNK):
        expert = _load_experts(experts, chunk + lane, routed_end, NUM_EXPERTS, expert_map, map_size)
        # Expert and lane in one integer: its order is the stable one.
        key = tl.sort(tl.where(expert >= 0, expert, EXPERTS_PADDED - 1 - expert) * CHUNK + lane)
        expert, entry = key // CHUNK, chunk + key % CHUNK
        routed = expert < EXPERTS_PADDED
        none = EXPERTS_PADDED - 1 - expert
        expert = tl.where(routed, expert, 0)
        counts = tl.histogram(expert, EXPERTS_PADDED, mask=routed)
        place = tl.gather(starts - (tl.cumsum(counts) - counts), expert, 0) + lane
        tl.store(order + place, entry, mask=routed)
        tl.store(places + entry, tl.where(routed, place, none), mask=entry < end)
        starts += counts


@Kernel
@triton.jit(do_not_specialize=["entries", "block_entries", "map_size"])
def _count(
    experts, expert_map, map_size, block_counts, entries, block_entries,
    NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    first = block * block_entries
    end = tl.minimum(first + block_entries, entries)
    counts = count_entries(experts, first, end, NUM_EXPERTS, EXPERTS_PADDED, CHUNK, expert_map, map_size)
    expert = tl.arange(0, EXPERTS_PADDED)
    tl.store(block_counts + block * NUM_EXPERTS + expert, counts, mask=expert < NUM_EXPERTS)


@Kernel
@triton.jit(do_not_specialize=["map_size", "entries", "block_entries", "capacity"])
def _sort(
    context, experts, expert_map, map_size, block_counts, order, places, offsets, tiles, tile_count, entries,
    block_entries, capacity,
    NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TILE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    block, blocks = tl.program_id(0), tl.num_programs(0)
    first = block * block_entries
    end = tl.minimum(first + block_entries, entries)
    routed_end = end
    if block_counts is None:
        before = tl.zeros((EXPERTS_PADDED,), tl.int32)
        counts = count_entries(experts, first, end, NUM_EXPERTS, EXPERTS_PADDED, CHUNK, expert_map, map_size)
    else:
        expert = tl.arange(0, EXPERTS_PADDED)
        before = tl.zeros((EXPERTS_PADDED,), tl.int32)
        counts = tl.zeros((EXPERTS_PADDED,), tl.int32)
        for start in range(0, blocks, BLOCK_ROWS):
            other = start + tl.arange(0, BLOCK_ROWS)
            mask = (other < blocks)[:, None] & (expert < NUM_EXPERTS)[None, :]
            part = tl.load(block_counts + other[:, None] * NUM_EXPERTS + expert[None, :], mask=mask, other=0)
            counts += tl.sum(part, axis=0)
            before += tl.sum(tl.where((other < block)[:, None], part, 0), axis=0)
        if context is not None:
            total = tl.sum(counts)
            if (total > capacity) & (block == 0):
                zero = tl.full((), 0, tl.int64)
                fail(context, CODE_TOO_MANY_ENTRIES, zero, zero, zero, zero + capacity, total.to(tl.int64))
            # Beyond its capacity the sorted index must not be written, nor read by the kernels that follow.
            counts = tl.where(total > capacity, 0, counts)
            routed_end = tl.where(total > capacity, first, end)
    starts = write_tiles(counts, offsets, tiles, tile_count, block, blocks, NUM_EXPERTS, EXPERTS_PADDED, TILE_ROWS)
    place_entries(
        experts, order, places, starts + before, first, routed_end, end, NUM_EXPERTS, EXPERTS_PADDED, CHUNK, expert_map,
        map_size,
    )  # fmt: skip


def sort_received(
    context: Tensor, experts: Tensor, block_counts: Tensor, block_entries: int, capacity: int, tile_rows: int
) -> Layout:
    """Sort entries from all ranks by local expert.

    experts: [R, K] int32, local ids, -1 for elsewhere. block_counts: [B, E_local] int32, the entries of each expert in
    each block of ``block_entries``. capacity: entries at most; more fail the context, and nothing is routed then.
    """
    layout = empty_layout(experts, block_counts.shape[1], capacity, tile_rows)
    _launch_sort(layout, context, experts, None, block_counts, block_entries, LARGEST_CHUNK)
    return layout


def local_layout(experts: Tensor, num_experts: int, tile_rows: int, expert_map: Tensor | None = None) -> Layout:
    """Sort the entries of this rank's own tokens.

    experts: [T, K] integers; -1 is not routed, and neither are ids out of range, which ``places`` tells apart.
    expert_map: int32, of each id the local expert, -1 for one elsewhere; ids are local ones where there is none.
    """
    entries = experts.numel()
    if entries <= SINGLE_PROGRAM_ENTRIES:
        layout = empty_layout(experts, num_experts, entries, tile_rows)
        _launch_sort(layout, None, experts, expert_map, None, entries, choose_chunk(entries))
        return layout
    block_entries = block_entries_of(entries)
    block_counts = new_block_counts(experts, block_entries, num_experts)
    _count[(block_counts.shape[0],)](
        experts, *_map(expert_map), block_counts, entries, block_entries, **entry_sizes(num_experts),
        CHUNK=LARGEST_CHUNK, num_warps=8,
    )  # fmt: skip
    return sort_counted(experts, block_counts, block_entries, tile_rows, expert_map)


def _map(expert_map: Tensor | None) -> tuple[Tensor | None, int]:
    return expert_map, 0 if expert_map is None else expert_map.shape[0]


def load_local_layout(device: torch.device, num_experts: int, tile_rows: int) -> None:
    """Launch every variant of ``local_layout`` for int32 ids: which one it takes follows from the number of entries."""
    for entries in (1, SMALLEST_CHUNK + 1, SINGLE_PROGRAM_ENTRIES + 1):
        local_layout(torch.full((entries, 1), -1, dtype=torch.int32, device=device), num_experts, tile_rows)


def unsorted_layout(experts: Tensor) -> Layout:
    """Each entry of ids ``experts`` [T, K] in its own place and in a row tile of its own; nothing is launched.

    For the forward GEMMs alone. Two entries of one expert read its weights twice: for few entries.
    """
    flat = experts.flatten()
    return Layout(flat, experts, flat, flat, flat, 1)


def can_stay_unsorted(tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether so few entries that hardly two share an expert; those of one token never do."""
    return tokens == 1 or 0 < 4 * tokens * top_k <= num_experts


def sort_counted(
    experts: Tensor, block_counts: Tensor, block_entries: int, tile_rows: int, expert_map: Tensor | None = None
) -> Layout:
    """``local_layout`` where ``block_counts`` [B, E] int32 has the entries of each expert in each block of entries."""
    layout = empty_layout(experts, block_counts.shape[1], experts.numel(), tile_rows)
    _launch_sort(layout, None, experts, expert_map, block_counts, block_entries, choose_chunk(block_entries))
    return layout


def empty_layout(experts: Tensor, num_experts: int, capacity: int, tile_rows: int) -> Layout:
    """Undefined layout of entries ``experts`` [R, K]."""
    row_tiles = max(capacity // tile_rows + min(num_experts, capacity), 1)
    shapes = ((capacity,), experts.shape, (num_experts + 1,), (row_tiles, 4), (1,))
    order, places, offsets, tiles, tile_count = (
        torch.empty(shape, dtype=torch.int32, device=experts.device) for shape in shapes
    )
    return Layout(order, places, offsets, tiles, tile_count, tile_rows)


def new_block_counts(experts: Tensor, block_entries: int, num_experts: int) -> Tensor:
    blocks = max(ceil_div(experts.numel(), block_entries), 1)
    return torch.empty(blocks, num_experts, dtype=torch.int32, device=experts.device)


def entry_sizes(num_experts: int) -> dict[str, int]:
    """Compile-time sizes of whatever counts and places entries."""
    return {"NUM_EXPERTS": num_experts, "EXPERTS_PADDED": max(padded(num_experts), 16)}


def choose_chunk(entries: int) -> int:
    """Entries that a program with so many sorts at a time; few choices, as each is compiled."""
    return SMALLEST_CHUNK if entries <= SMALLEST_CHUNK else LARGEST_CHUNK


def block_entries_of(entries: int) -> int:
    return max(LARGEST_CHUNK, ceil_div(entries, MAXIMUM_BLOCKS))


def _launch_sort(
    layout: Layout, context: Tensor | None, experts: Tensor, expert_map: Tensor | None, block_counts: Tensor | None,
    block_entries: int, chunk: int,
) -> None:  # fmt: skip
    *tensors, tile_rows = layout
    sizes = entry_sizes(layout.offsets.shape[0] - 1)
    _sort[(1 if block_counts is None else block_counts.shape[0],)](
        context, experts, *_map(expert_map), block_counts, *tensors, experts.numel(), block_entries,
        layout.order.shape[0], **sizes, TILE_ROWS=tile_rows, CHUNK=chunk,
        BLOCK_ROWS=max(8192 // sizes["EXPERTS_PADDED"], 1), num_warps=8 if chunk == LARGEST_CHUNK else 4,
    )  # fmt: skip
