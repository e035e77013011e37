"""Which row goes where, decided on the device without asking the host.

At the sender: a row goes once to each rank that holds one of the token's experts, in token order.
At the receiver: the (row, top-k position) entries of each local expert, in order of source rank, token and position.
Both orders are a function of the routing alone, so results do not depend on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .machine import padded
from .protocol import CODE_EXPERT_OUT_OF_RANGE, CODE_REPEATED_EXPERT, WORLD, fail, is_alive

BLOCK = 1024


@triton.jit(do_not_specialize=["tokens"])
def _send_positions(
    context, experts, positions, counts, tokens,
    NUM_LOCAL_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    peer = tl.program_id(0)
    world = tl.load(context + WORLD)
    sent = tl.zeros((), tl.int32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        in_range = token < tokens
        wanted = tl.zeros((BLOCK,), tl.int32)
        for k in tl.static_range(TOP_K):
            expert = tl.load(experts + token.to(tl.int64) * TOP_K + k, mask=in_range, other=-1).to(tl.int64)
            wanted |= ((expert >= 0) & (expert // NUM_LOCAL_EXPERTS == peer)).to(tl.int32)
            wrong = tl.max(tl.where((expert < -1) | (expert >= NUM_LOCAL_EXPERTS * world), 1, 0))
            if wrong > 0:
                fail(
                    context, CODE_EXPERT_OUT_OF_RANGE, peer.to(tl.int64), tl.full((), 0, tl.int64),
                    tl.full((), 0, tl.int64), NUM_LOCAL_EXPERTS * world, tl.max(expert),
                )  # fmt: skip
        position = sent + tl.cumsum(wanted) - wanted
        tl.store(positions + token.to(tl.int64) * world + peer, tl.where(wanted > 0, position, -1), mask=in_range)
        sent += tl.sum(wanted)
    tl.store(counts + peer, sent)


@triton.jit(do_not_specialize=["rows_per_source", "entries"])
def _count_entries(
    context, experts, received, found, rows_per_source, entries,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    count = tl.zeros((), tl.int32)
    for start in range(0, entries, BLOCK):
        count += tl.sum(_is_entry(experts, received, start, rows_per_source, entries, expert, TOP_K, BLOCK))
    # A failed round computes nothing: its rows may be anything.
    tl.store(found + expert, tl.where(is_alive(context), count, 0))


@triton.jit
def _is_entry(
    experts, received, start, rows_per_source, entries, expert, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    entry = start + tl.arange(0, BLOCK)
    row = entry // TOP_K
    in_range = entry < entries
    arrived = row % rows_per_source < tl.load(received + row // rows_per_source, mask=in_range, other=0)
    mine = tl.load(experts + entry.to(tl.int64), mask=in_range & arrived, other=-1) == expert
    return mine.to(tl.int32)


@triton.jit(do_not_specialize=["rows_per_source", "entries", "capacity"])
def _sort_entries(
    context, experts, received, found, entry_counts, sorted_entries, rows_per_source, entries, capacity,
    NUM_LOCAL_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    index = tl.arange(0, EXPERTS_PADDED)
    counts = tl.load(found + index, mask=index < NUM_LOCAL_EXPERTS, other=0)
    written = tl.sum(tl.where(index < expert, counts, 0))
    total = tl.sum(counts)
    count = tl.load(found + expert)
    # Beyond its capacity the sorted index must not be written, nor read by the kernels that follow.
    tl.store(entry_counts + expert, tl.where(total > capacity, 0, count))
    if total > capacity:
        zero = tl.full((), 0, tl.int64)
        fail(context, CODE_REPEATED_EXPERT, zero, zero, zero, zero + capacity, total.to(tl.int64))
    elif count > 0:
        for start in range(0, entries, BLOCK):
            mine = _is_entry(experts, received, start, rows_per_source, entries, expert, TOP_K, BLOCK)
            at = written + tl.cumsum(mine) - mine
            tl.store(sorted_entries + at.to(tl.int64), start + tl.arange(0, BLOCK), mask=mine > 0)
            written += tl.sum(mine)


def send_layout(context: Tensor, experts: Tensor, world: int, num_local_experts: int) -> tuple[Tensor, Tensor]:
    """Where each token's row goes.

    experts: [T, K] int32, global ids, -1 for not routed; an id out of range fails the context.
    Returns positions [T, world] int32, the row's place among this rank's rows at that rank or -1, and counts [world].
    """
    tokens, top_k = experts.shape
    positions = torch.empty(tokens, world, dtype=torch.int32, device=experts.device)
    counts = torch.empty(world, dtype=torch.int32, device=experts.device)
    _send_positions[(world,)](
        context, experts, positions, counts, tokens, NUM_LOCAL_EXPERTS=num_local_experts, TOP_K=top_k, BLOCK=BLOCK
    )
    return positions, counts


def expert_layout(
    context: Tensor, experts: Tensor, received: Tensor, rows_per_source: int, num_local_experts: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """Sort the received entries by local expert.

    experts: [R, K] int32, local ids, -1 for elsewhere; row r came from rank r // rows_per_source.
    received: [world] int32, how many rows of each source are valid.
    capacity: R * min(K, E_local), which distinct experts of a token cannot exceed; repeated ones fail the context.
    Returns entry_counts [E_local] int32 and sorted_entries [capacity] int32, indices into experts.flatten(); those
    after the sum of the counts are undefined.
    """
    entries = experts.numel()
    found = torch.empty(num_local_experts, dtype=torch.int32, device=experts.device)
    counts = torch.empty_like(found)
    order = torch.empty(capacity, dtype=torch.int32, device=experts.device)
    top_k = experts.shape[1]
    grid = (num_local_experts,)
    _count_entries[grid](context, experts, received, found, rows_per_source, entries, TOP_K=top_k, BLOCK=BLOCK)
    _sort_entries[grid](
        context, experts, received, found, counts, order, rows_per_source, entries, capacity,
        NUM_LOCAL_EXPERTS=num_local_experts, EXPERTS_PADDED=padded(num_local_experts), TOP_K=top_k, BLOCK=BLOCK,
    )  # fmt: skip
    return counts, order
