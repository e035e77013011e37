"""Which row goes where, decided on the device without asking the host.

At the sender: a row goes once to each rank that holds one of the token's experts, in token order.
Where the experts are: the (row, top-k position) entries of each expert, in order of row and position.
Both orders are a function of the routing alone, so results do not depend on timing.

Each takes two launches. The first counts what every block of the input holds for every expert (or peer); in the second
each block sums the counts of the blocks before it, and so knows where its own entries start. The first can be part of
the router (routing.py), and a layout of few entries needs one program and no first launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .machine import padded
from .protocol import CODE_EXPERT_OUT_OF_RANGE, CODE_REPEATED_EXPERT, WORLD, fail, is_alive

SEND_BLOCK = 512
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
def _local_rows(experts, token, tokens, peer, NUM_LOCAL_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, K: tl.constexpr):
    """Ids [tokens, K] of a block of tokens, and whether each has one at that peer."""
    k = tl.arange(0, K)
    mask = (token < tokens)[:, None] & (k < TOP_K)[None, :]
    expert = tl.load(experts + token.to(tl.int64)[:, None] * TOP_K + k[None, :], mask=mask, other=-1)
    there = (expert >= 0) & (expert // NUM_LOCAL_EXPERTS == peer)
    return expert, tl.max(there.to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["tokens"])
def _count_rows(
    experts, block_counts, tokens,
    NUM_LOCAL_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, peer = tl.program_id(0), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    _, wanted = _local_rows(experts, token, tokens, peer, NUM_LOCAL_EXPERTS, TOP_K, TOP_K_PADDED)
    tl.store(block_counts + peer * tl.num_programs(0) + block, tl.sum(wanted))


@triton.jit(do_not_specialize=["tokens"])
def _send_positions(
    context, experts, block_counts, positions, counts, tokens,
    NUM_LOCAL_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, peer = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    world = tl.load(context + WORLD)
    before = tl.zeros((), tl.int32)
    for start in range(0, block, BLOCK):
        earlier = start + tl.arange(0, BLOCK)
        before += tl.sum(tl.load(block_counts + peer * blocks + earlier, mask=earlier < block, other=0))
    token = block * BLOCK + tl.arange(0, BLOCK)
    expert, wanted = _local_rows(experts, token, tokens, peer, NUM_LOCAL_EXPERTS, TOP_K, TOP_K_PADDED)
    position = before + tl.cumsum(wanted) - wanted
    at = positions + token.to(tl.int64) * world + peer
    tl.store(at, tl.where(wanted > 0, position, -1), mask=token < tokens)
    if block == blocks - 1:
        tl.store(counts + peer, before + tl.sum(wanted))
    if peer == 0:
        wrong = (expert < -1) | (expert >= NUM_LOCAL_EXPERTS * world)
        if tl.max(wrong.to(tl.int32)) > 0:
            zero = tl.full((), 0, tl.int64)
            seen = tl.max(tl.where(wrong, expert, -2147483648)).to(tl.int64)
            fail(context, CODE_EXPERT_OUT_OF_RANGE, zero, zero, zero, NUM_LOCAL_EXPERTS * world, seen)


@triton.jit
def _load_experts(experts, received, entry, end, rows_per_source, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr):
    """Expert of each entry before ``end``; -1 for none and for rows that did not arrive, -2 for ids out of range."""
    valid = entry < end
    if received is not None:
        row = entry // TOP_K
        valid &= row % rows_per_source < tl.load(received + row // rows_per_source, mask=valid, other=0)
    expert = tl.load(experts + entry, mask=valid, other=-1)
    return tl.where((expert >= -1) & (expert < NUM_EXPERTS), expert, OUT_OF_RANGE).to(tl.int32)


@triton.jit
def count_entries(
    experts, received, first, end, rows_per_source,
    NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOP_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """How many of the entries [first, end) each expert has: [EXPERTS_PADDED]."""
    counts = tl.zeros((EXPERTS_PADDED,), tl.int32)
    for start in range(first, end, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        expert = _load_experts(experts, received, entry, end, rows_per_source, NUM_EXPERTS, TOP_K)
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
    experts, received, order, places, starts, first, routed_end, end, rows_per_source,
    NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOP_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sort the entries [first, end), none of which is routed from ``routed_end`` on, to ``starts`` of their experts."""
    lane = tl.arange(0, CHUNK)
    for chunk in range(first, end, CHUNK):
        expert = _load_experts(experts, received, chunk + lane, routed_end, rows_per_source, NUM_EXPERTS, TOP_K)
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


@triton.jit(do_not_specialize=["rows_per_source", "entries", "block_entries"])
def _count(
    context, experts, received, block_counts, rows_per_source, entries, block_entries,
    NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOP_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    first = block * block_entries
    end = tl.minimum(first + block_entries, entries)
    counts = count_entries(
        experts, received, first, end, rows_per_source, NUM_EXPERTS, EXPERTS_PADDED, TOP_K, CHUNK
    )  # fmt: skip
    if context is not None:
        # A failed round computes nothing: its rows may be anything.
        counts = tl.where(is_alive(context), counts, 0)
    expert = tl.arange(0, EXPERTS_PADDED)
    tl.store(block_counts + block * NUM_EXPERTS + expert, counts, mask=expert < NUM_EXPERTS)


@triton.jit(do_not_specialize=["rows_per_source", "entries", "block_entries", "capacity"])
def _sort(
    context, experts, received, block_counts, order, places, offsets, tiles, tile_count,
    rows_per_source, entries, block_entries, capacity,
    NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOP_K: tl.constexpr, TILE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    block, blocks = tl.program_id(0), tl.num_programs(0)
    first = block * block_entries
    end = tl.minimum(first + block_entries, entries)
    routed_end = end
    if block_counts is None:
        before = tl.zeros((EXPERTS_PADDED,), tl.int32)
        counts = count_entries(
            experts, received, first, end, rows_per_source, NUM_EXPERTS, EXPERTS_PADDED, TOP_K, CHUNK
        )  # fmt: skip
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
                fail(context, CODE_REPEATED_EXPERT, zero, zero, zero, zero + capacity, total.to(tl.int64))
            # Beyond its capacity the sorted index must not be written, nor read by the kernels that follow. Nor may a
            # block place entries that it did not count because the context had failed.
            counts = tl.where(total > capacity, 0, counts)
            own = tl.load(block_counts + block * NUM_EXPERTS + expert, mask=expert < NUM_EXPERTS, other=0)
            routed_end = tl.where((total > capacity) | (tl.sum(own) == 0), first, end)
    starts = write_tiles(counts, offsets, tiles, tile_count, block, blocks, NUM_EXPERTS, EXPERTS_PADDED, TILE_ROWS)
    place_entries(
        experts, received, order, places, starts + before, first, routed_end, end, rows_per_source,
        NUM_EXPERTS, EXPERTS_PADDED, TOP_K, CHUNK,
    )  # fmt: skip


def send_layout(context: Tensor, experts: Tensor, world: int, num_local_experts: int) -> tuple[Tensor, Tensor]:
    """Where each token's row goes.

    experts: [T, K] int32, global ids, -1 for not routed; an id out of range fails the context.
    Returns positions [T, world] int32, the row's place among this rank's rows at that rank or -1, and counts [world].
    """
    tokens, top_k = experts.shape
    blocks = max(triton.cdiv(tokens, SEND_BLOCK), 1)
    block_counts, positions, counts = (
        torch.empty(shape, dtype=torch.int32, device=experts.device)
        for shape in ((world, blocks), (tokens, world), (world,))
    )
    sizes = {
        "NUM_LOCAL_EXPERTS": num_local_experts, "TOP_K": top_k, "TOP_K_PADDED": padded(top_k), "BLOCK": SEND_BLOCK,
    }  # fmt: skip
    _count_rows[(blocks, world)](experts, block_counts, tokens, **sizes)
    _send_positions[(blocks, world)](context, experts, block_counts, positions, counts, tokens, **sizes)
    return positions, counts


def expert_layout(
    context: Tensor,
    experts: Tensor,
    received: Tensor,
    rows_per_source: int,
    num_local_experts: int,
    capacity: int,
    tile_rows: int,
) -> Layout:
    """Sort the received entries by local expert; nothing is routed in a failed context.

    experts: [R, K] int32, local ids, -1 for elsewhere; row r came from rank r // rows_per_source.
    received: [world] int32, how many rows of each source are valid.
    capacity: R * min(K, E_local), which distinct experts of a token cannot exceed; repeated ones fail the context.
    """
    # One variant for every number of entries: loading another while a kernel waits for a peer would deadlock.
    block_entries = _block_entries(experts.numel())
    block_counts = new_block_counts(experts, block_entries, num_local_experts)
    sizes = entry_sizes(num_local_experts, experts.shape[1])
    _count[(block_counts.shape[0],)](
        context, experts, received, block_counts, rows_per_source, experts.numel(), block_entries,
        **sizes, CHUNK=LARGEST_CHUNK, num_warps=8,
    )  # fmt: skip
    layout = empty_layout(experts, num_local_experts, capacity, tile_rows)
    _launch_sort(layout, context, experts, received, block_counts, rows_per_source, block_entries, LARGEST_CHUNK)
    return layout


def local_layout(experts: Tensor, num_experts: int, tile_rows: int) -> Layout:
    """Sort the entries of this rank's own tokens.

    experts: [T, K] integers; -1 is not routed, and neither are ids out of range, which ``places`` tells apart.
    """
    entries = experts.numel()
    if entries <= SINGLE_PROGRAM_ENTRIES:
        layout = empty_layout(experts, num_experts, entries, tile_rows)
        _launch_sort(layout, None, experts, None, None, 1, entries, choose_chunk(entries))
        return layout
    block_entries = _block_entries(entries)
    block_counts = new_block_counts(experts, block_entries, num_experts)
    _count[(block_counts.shape[0],)](
        None, experts, None, block_counts, 1, entries, block_entries,
        **entry_sizes(num_experts, experts.shape[1]), CHUNK=LARGEST_CHUNK, num_warps=8,
    )  # fmt: skip
    return sort_counted(experts, block_counts, block_entries, tile_rows)


def unsorted_layout(experts: Tensor) -> Layout:
    """Each entry of ids ``experts`` [T, K] in its own place and in a row tile of its own; nothing is launched.

    For the forward GEMMs alone. Two entries of one expert read its weights twice: for few entries.
    """
    flat = experts.flatten()
    return Layout(flat, experts, flat, flat, flat, 1)


def can_stay_unsorted(tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether so few entries that hardly two share an expert; those of one token never do."""
    return tokens == 1 or 0 < 4 * tokens * top_k <= num_experts


def sort_counted(experts: Tensor, block_counts: Tensor, block_entries: int, tile_rows: int) -> Layout:
    """``local_layout`` where ``block_counts`` [B, E] int32 has the entries of each expert in each block of entries."""
    layout = empty_layout(experts, block_counts.shape[1], experts.numel(), tile_rows)
    _launch_sort(layout, None, experts, None, block_counts, 1, block_entries, choose_chunk(block_entries))
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
    blocks = max(triton.cdiv(experts.numel(), block_entries), 1)
    return torch.empty(blocks, num_experts, dtype=torch.int32, device=experts.device)


def entry_sizes(num_experts: int, top_k: int) -> dict[str, int]:
    """Compile-time sizes of whatever counts and places entries."""
    return {"NUM_EXPERTS": num_experts, "EXPERTS_PADDED": max(padded(num_experts), 16), "TOP_K": top_k}


def choose_chunk(entries: int) -> int:
    """Entries that a program with so many sorts at a time; few choices, as each is compiled."""
    return SMALLEST_CHUNK if entries <= SMALLEST_CHUNK else LARGEST_CHUNK


def _block_entries(entries: int) -> int:
    return max(LARGEST_CHUNK, triton.cdiv(entries, MAXIMUM_BLOCKS))


def _launch_sort(
    layout: Layout, context: Tensor | None, experts: Tensor, received: Tensor | None, block_counts: Tensor | None,
    rows_per_source: int, block_entries: int, chunk: int,
) -> None:  # fmt: skip
    *tensors, tile_rows = layout
    sizes = entry_sizes(layout.offsets.shape[0] - 1, experts.shape[1])
    _sort[(1 if block_counts is None else block_counts.shape[0],)](
        context, experts, received, block_counts, *tensors,
        rows_per_source, experts.numel(), block_entries, layout.order.shape[0],
        **sizes, TILE_ROWS=tile_rows, CHUNK=chunk, BLOCK_ROWS=max(8192 // sizes["EXPERTS_PADDED"], 1),
        num_warps=8 if chunk == LARGEST_CHUNK else 4,
    )  # fmt: skip
