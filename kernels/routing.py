"""Router: from hidden states to the top-k experts of each token, their weights and layout, and the logits' gradient.

Softmax or sigmoid scores, DeepSeek-V3's selection bias and group-limited choice, optional normalisation over the
chosen experts. Sources: DeepSeek-V2 (arXiv 2405.04434, device-limited routing), DeepSeek-V3 (arXiv 2412.19437,
section 2.1.2, auxiliary-loss-free balancing). Ties go to the lower expert id.

Two launches, split where the number of tokens asks for it:
- few tokens: many programs share the weight of the gate; then one program chooses and sorts the entries (layout.py);
- many: each program computes the logits of its tokens, chooses, and counts what it chose; then the entries are sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gate import gate_tile, split_logits, whole_tile
from .launchable import Kernel
from .layout import (
    MAXIMUM_BLOCKS,
    SINGLE_PROGRAM_ENTRIES,
    Layout,
    choose_chunk,
    count_entries,
    empty_layout,
    entry_sizes,
    new_block_counts,
    place_entries,
    sort_counted,
    write_tiles,
)
from .machine import INTERPRETED, ceil_div, padded

NORMALISATION_EPSILON = tl.constexpr(1e-20)
LOWEST = tl.constexpr(-1.0e38)  # the sum of two is finite
SINGLE_PROGRAM_SCORES = 16384
FEW_SCORES = 1024
# Left to itself, the assembler sometimes spills to fit a second program on an SM; there is none to fit.
ALL_REGISTERS = {"maxnreg": 255}


@triton.jit
def _score(logits, row_max, row_sum, SIGMOID: tl.constexpr):
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp(-logits))
    return tl.exp(logits - row_max) / row_sum


@triton.jit
def _choose(
    partials, logits, bias, experts, weights, first, end, tokens, scaling,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    TWO_PER_GROUP: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, GROUPS_PADDED: tl.constexpr, GROUP_SIZE_PADDED: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
):  # fmt: skip
    """Route a block of tokens from ``first`` on, none from ``end`` on."""
    GROUP_SIZE: tl.constexpr = NUM_EXPERTS // GROUPS
    WIDTH: tl.constexpr = GROUPS_PADDED * GROUP_SIZE_PADDED
    token = (first + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    in_range = token < end
    # Experts lie as [group, member], both padded, so that groups of any size are one reshape away.
    column = tl.arange(0, WIDTH)
    group, member = column // GROUP_SIZE_PADDED, column % GROUP_SIZE_PADDED
    exists = (group < GROUPS) & (member < GROUP_SIZE)
    expert = group * GROUP_SIZE + member
    valid = in_range[:, None] & exists[None, :]
    at = token[:, None] * NUM_EXPERTS + expert[None, :]
    if partials is None:
        row = tl.load(logits + at, mask=valid, other=0.0).to(tl.float32)
    else:
        row = tl.load(partials + at, mask=valid, other=0.0)
        for split in tl.static_range(1, SPLITS):
            row += tl.load(partials + split * tokens * NUM_EXPERTS + at, mask=valid, other=0.0)
        tl.store(logits + at, row, mask=valid)
        tl.debug_barrier()
    # A row past the last token keeps its zeros: it would divide by zero.
    row = tl.where(in_range[:, None] & ~exists[None, :], float("-inf"), row)
    row_max, row_sum = tl.max(row, axis=1)[:, None], 1.0
    if not SIGMOID:
        row_sum = tl.sum(tl.exp(row - row_max), axis=1)[:, None]
    choice = _score(row, row_max, row_sum, SIGMOID)
    if bias is not None:
        choice += tl.load(bias + expert, mask=exists, other=0.0).to(tl.float32)[None, :]
    # A NaN compares with nothing: it must not lead out of the range of the experts. The weights still carry it.
    choice = tl.where(choice == choice, choice, LOWEST)
    choice = tl.where(exists[None, :], choice, float("-inf"))

    if TOP_GROUPS < GROUPS:
        members = tl.reshape(choice, (BLOCK_TOKENS, GROUPS_PADDED, GROUP_SIZE_PADDED))
        group_score = tl.max(members, axis=2)
        if TWO_PER_GROUP:
            best = tl.argmax(members, axis=2)
            rest = tl.where(tl.arange(0, GROUP_SIZE_PADDED)[None, None, :] == best[:, :, None], float("-inf"), members)
            group_score += tl.max(rest, axis=2)
        group_index = tl.arange(0, GROUPS_PADDED)
        kept = tl.zeros((BLOCK_TOKENS, GROUPS_PADDED), tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            best_group = tl.argmax(group_score, axis=1)
            hit = group_index[None, :] == best_group[:, None]
            kept += hit.to(tl.int32)
            group_score = tl.where(hit, float("-inf"), group_score)
        members = tl.where((kept > 0)[:, :, None], members, float("-inf"))
        choice = tl.reshape(members, (BLOCK_TOKENS, WIDTH))

    # Integers in the order of the floats: a warp finds their maximum in one instruction.
    key = choice.to(tl.int32, bitcast=True)
    key = key ^ ((key >> 31) & 0x7FFFFFFF)
    position = tl.arange(0, TOP_K_PADDED)
    chosen = tl.zeros((BLOCK_TOKENS, TOP_K_PADDED), tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.min(tl.where(key == tl.max(key, axis=1)[:, None], column[None, :], WIDTH), axis=1)
        key = tl.where(column[None, :] == best[:, None], -2147483648, key)
        best = (best // GROUP_SIZE_PADDED) * GROUP_SIZE + best % GROUP_SIZE_PADDED
        chosen += tl.where(position[None, :] == k, best[:, None], 0)
    position_valid = in_range[:, None] & (position < TOP_K)[None, :]
    # Reading the chosen logits again is cheaper than picking their scores out of all those of the row.
    chosen_logit = tl.load(logits + token[:, None] * NUM_EXPERTS + chosen, mask=position_valid, other=float("-inf"))
    weight = _score(chosen_logit.to(tl.float32), row_max, row_sum, SIGMOID)
    if NORMALISE:
        weight = weight / (tl.sum(weight, axis=1)[:, None] + NORMALISATION_EPSILON)
    at = token[:, None] * TOP_K + position[None, :]
    tl.store(experts + at, chosen, mask=position_valid)
    tl.store(weights + at, weight * scaling, mask=position_valid)


@Kernel
@triton.jit(do_not_specialize=["tokens", "program_tokens"])
def _route(
    hidden_states, gate_weight, partials, logits, bias, experts, weights, block_counts,
    order, places, offsets, tiles, tile_count, tokens, program_tokens, scaling,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    TWO_PER_GROUP: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, GROUPS_PADDED: tl.constexpr, GROUP_SIZE_PADDED: tl.constexpr,
    TOP_K_PADDED: tl.constexpr, EXPERTS_PADDED: tl.constexpr, CHUNK: tl.constexpr, TILE_ROWS: tl.constexpr,
    HIDDEN: tl.constexpr, GATE_TOKENS: tl.constexpr, GATE_EXPERTS: tl.constexpr, GATE_DEPTH: tl.constexpr,
    AS_FLOAT32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * program_tokens
    end = tl.minimum(first + program_tokens, tokens)
    if hidden_states is not None:
        for start in range(first, end, GATE_TOKENS):
            token = (start + tl.arange(0, GATE_TOKENS)).to(tl.int64)
            for first_expert in tl.static_range(0, NUM_EXPERTS, GATE_EXPERTS):
                total = gate_tile(
                    hidden_states, gate_weight, token, end, first_expert, 0, HIDDEN,
                    NUM_EXPERTS, HIDDEN, GATE_TOKENS, GATE_EXPERTS, GATE_DEPTH, AS_FLOAT32, PRECISION,
                )  # fmt: skip
                expert = first_expert + tl.arange(0, GATE_EXPERTS)
                mask = (token < end)[:, None] & (expert < NUM_EXPERTS)[None, :]
                tl.store(logits + token[:, None] * NUM_EXPERTS + expert[None, :], total, mask=mask)
        # Each thread reads what others of its program wrote.
        tl.debug_barrier()
    for start in range(first, end, BLOCK_TOKENS):
        _choose(
            partials, logits, bias, experts, weights, start, end, tokens, scaling,
            NUM_EXPERTS, TOP_K, GROUPS, TOP_GROUPS, TWO_PER_GROUP, SIGMOID, NORMALISE, SPLITS,
            BLOCK_TOKENS, GROUPS_PADDED, GROUP_SIZE_PADDED, TOP_K_PADDED,
        )  # fmt: skip
    if CHUNK > 0:
        tl.debug_barrier()
        first, end = first * TOP_K, end * TOP_K
        counts = count_entries(experts, first, end, NUM_EXPERTS, EXPERTS_PADDED, CHUNK)
        if order is None:
            index = tl.arange(0, EXPERTS_PADDED)
            own = block_counts + tl.program_id(0) * NUM_EXPERTS
            tl.store(own + index, counts, mask=index < NUM_EXPERTS)
        else:
            starts = write_tiles(counts, offsets, tiles, tile_count, 0, 1, NUM_EXPERTS, EXPERTS_PADDED, TILE_ROWS)
            place_entries(experts, order, places, starts, first, end, end, NUM_EXPERTS, EXPERTS_PADDED, CHUNK)


@Kernel
@triton.jit(do_not_specialize=["tokens"])
def _route_backward(
    logits, experts, weights_gradient, logits_gradient, tokens,
    scaling,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, WIDTH: tl.constexpr, TOP_K_PADDED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_range = token < tokens
    column = tl.arange(0, WIDTH)
    exists = column < NUM_EXPERTS
    valid = in_range[:, None] & exists[None, :]
    at = token[:, None] * NUM_EXPERTS + column[None, :]
    row = tl.load(logits + at, mask=valid, other=float("-inf"))
    row = tl.where(in_range[:, None], row.to(tl.float32), 0.0)
    row_max, row_sum = tl.max(row, axis=1)[:, None], 1.0
    if not SIGMOID:
        row_sum = tl.sum(tl.exp(row - row_max), axis=1)[:, None]
    scores = _score(row, row_max, row_sum, SIGMOID)

    # With s the chosen scores and S their sum, w_k = c s_k / S gives ds_k = c (dw_k - sum_j dw_j s_j / S) / S.
    position = tl.arange(0, TOP_K_PADDED)
    mask = in_range[:, None] & (position < TOP_K)[None, :]
    chosen_at = token[:, None] * TOP_K + position[None, :]
    chosen = tl.load(experts + chosen_at, mask=mask, other=0)
    chosen_logit = tl.load(logits + token[:, None] * NUM_EXPERTS + chosen, mask=mask, other=float("-inf"))
    chosen_score = _score(chosen_logit.to(tl.float32), row_max, row_sum, SIGMOID)
    gradient = tl.load(weights_gradient + chosen_at, mask=mask, other=0.0)
    total, mean = 1.0, 0.0
    if NORMALISE:
        total = tl.sum(chosen_score, axis=1) + NORMALISATION_EPSILON
        mean = tl.sum(gradient * chosen_score, axis=1) / total
        gradient = tl.where(mask, (gradient - mean[:, None]) / total[:, None], 0.0)
    scores_gradient = tl.zeros((BLOCK_TOKENS, WIDTH), tl.float32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(experts + token * TOP_K + k, mask=in_range, other=-1)
        own = (tl.load(weights_gradient + token * TOP_K + k, mask=in_range, other=0.0) - mean) / total
        scores_gradient += tl.where(column[None, :] == expert[:, None], own[:, None], 0.0)
    if SIGMOID:
        result = scores_gradient * scores * (1.0 - scores)
    else:
        result = scores * (scores_gradient - tl.sum(chosen_score * gradient, axis=1)[:, None])
    result *= scaling
    tl.store(logits_gradient + at, result, mask=valid)


def route(
    hidden_states: Tensor,
    gate_weight: Tensor,
    top_k: int,
    *,
    sigmoid: bool,
    normalise: bool,
    scaling: float,
    groups: int,
    top_groups: int,
    bias: Tensor | None,
    tile_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Layout | None]:
    """Choose ``top_k`` experts a token from hidden states and, if ``tile_rows`` is positive, sort the entries.

    hidden_states: [T, H]; gate_weight: [E, H]; contiguous, of any floating dtypes. The rest as for ``route_logits``.
    Returns experts [T, K] int32 by falling choice, weights [T, K] float32, logits [T, E] float32, and the layout.
    """
    tokens, hidden = hidden_states.shape
    num_experts = gate_weight.shape[0]
    sizes = _choice_sizes(num_experts, top_k, sigmoid, normalise, groups, top_groups)
    width = sizes["GROUPS_PADDED"] * sizes["GROUP_SIZE_PADDED"]
    # What is compiled depends on this, not on the exact number.
    most_tokens = padded(tokens)
    partials = None
    if most_tokens * width <= SINGLE_PROGRAM_SCORES and most_tokens * top_k <= SINGLE_PROGRAM_ENTRIES:
        partials = split_logits(hidden_states, gate_weight, most_tokens)
        logits = partials[0] if len(partials) == 1 else torch.empty_like(partials[0])
        experts, weights = _empty_choice(logits, top_k)
        layout = empty_layout(experts, num_experts, experts.numel(), tile_rows) if tile_rows else None
        block_tokens, warps = _choice_block(width, most_tokens)
        program_tokens = tokens if tile_rows else block_tokens
        _route[(1 if tile_rows else max(ceil_div(tokens, block_tokens), 1),)](
            None, None, None if len(partials) == 1 else partials, logits, bias, experts, weights, None,
            *((None,) * 5 if layout is None else layout[:5]), tokens, program_tokens, scaling,
            **sizes, **_NO_GATE, SPLITS=len(partials), BLOCK_TOKENS=block_tokens,
            CHUNK=choose_chunk(most_tokens * top_k) if tile_rows else 0, TILE_ROWS=tile_rows,
            num_warps=warps, **ALL_REGISTERS,
        )  # fmt: skip
        return experts, weights, logits, layout
    logits = torch.empty(tokens, num_experts, dtype=torch.float32, device=hidden_states.device)
    experts, weights = _empty_choice(logits, top_k)
    tile = whole_tile(hidden_states, gate_weight, most_tokens)
    program_tokens = ceil_div(ceil_div(tokens, tile.tokens), MAXIMUM_BLOCKS) * tile.tokens
    block_counts = new_block_counts(experts, program_tokens * top_k, num_experts)
    _route[(block_counts.shape[0],)](
        hidden_states, gate_weight, None, logits, bias, experts, weights, block_counts, *(None,) * 5,
        tokens, program_tokens, scaling,
        **sizes, **tile.sizes(hidden_states, gate_weight), HIDDEN=hidden, SPLITS=1,
        BLOCK_TOKENS=max(min(tile.warps * (1024 if width <= 256 else 512) // width, tile.tokens), 1),
        CHUNK=choose_chunk(program_tokens * top_k) if tile_rows else 0, TILE_ROWS=0,
        num_warps=tile.warps, num_stages=tile.stages, **ALL_REGISTERS,
    )  # fmt: skip
    if not tile_rows:
        return experts, weights, logits, None
    return experts, weights, logits, sort_counted(experts, block_counts, program_tokens * top_k, tile_rows)


def route_logits(
    logits: Tensor,
    top_k: int,
    *,
    sigmoid: bool,
    normalise: bool,
    scaling: float,
    groups: int,
    top_groups: int,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Choose ``top_k`` experts a token from logits that are there already.

    logits: [T, E] float32. bias: [E] added to the scores for the choice alone, or None.
    The groups of sigmoid routing are ranked by their two best members (DeepSeek-V3), of softmax routing by their best
    (DeepSeek-V2).
    Returns experts [T, K] int32 by falling choice, and weights [T, K] float32.
    """
    tokens, num_experts = logits.shape
    experts, weights = _empty_choice(logits, top_k)
    sizes = _choice_sizes(num_experts, top_k, sigmoid, normalise, groups, top_groups)
    block_tokens, warps = _choice_block(sizes["GROUPS_PADDED"] * sizes["GROUP_SIZE_PADDED"], padded(tokens))
    _route[(max(ceil_div(tokens, block_tokens), 1),)](
        None, None, None, logits, bias, experts, weights, None, *(None,) * 5, tokens, block_tokens, scaling,
        **sizes, **_NO_GATE, SPLITS=1, BLOCK_TOKENS=block_tokens, CHUNK=0, TILE_ROWS=0,
        num_warps=warps, **ALL_REGISTERS,
    )  # fmt: skip
    return experts, weights


def route_backward(
    logits: Tensor, experts: Tensor, weights_gradient: Tensor, *, sigmoid: bool, normalise: bool, scaling: float
) -> Tensor:
    """Gradient of the logits [T, E] float32 from that of the weights [T, K]; the choice itself has none."""
    tokens, num_experts = logits.shape
    result = torch.empty_like(logits)
    width = padded(num_experts)
    block = max(1, min(32, 2048 // width))
    _route_backward[(max(ceil_div(tokens, block), 1),)](
        logits, experts, weights_gradient.contiguous(), result, tokens, scaling,
        NUM_EXPERTS=num_experts, TOP_K=experts.shape[1], SIGMOID=sigmoid, NORMALISE=normalise,
        BLOCK_TOKENS=block, WIDTH=width, TOP_K_PADDED=padded(experts.shape[1]),
    )  # fmt: skip
    return result


_NO_GATE = {"HIDDEN": 0, "GATE_TOKENS": 0, "GATE_EXPERTS": 0, "GATE_DEPTH": 0, "AS_FLOAT32": False, "PRECISION": ""}


def _choice_sizes(
    num_experts: int, top_k: int, sigmoid: bool, normalise: bool, groups: int, top_groups: int
) -> dict[str, int]:
    group_size = num_experts // groups
    return {
        **entry_sizes(num_experts), "TOP_K": top_k, "GROUPS": groups, "TOP_GROUPS": top_groups,
        "TWO_PER_GROUP": sigmoid and group_size > 1, "SIGMOID": sigmoid, "NORMALISE": normalise,
        "GROUPS_PADDED": padded(groups), "GROUP_SIZE_PADDED": padded(group_size), "TOP_K_PADDED": padded(top_k),
    }  # fmt: skip


def _choice_block(width: int, most_tokens: int) -> tuple[int, int]:
    """Tokens that a program chooses for at a time, of ``width`` scores each, and its warps."""
    if INTERPRETED:
        return 128, 4  # the interpreter pays by the program, not by the score
    scores, warps = (FEW_SCORES, 4) if most_tokens * width <= FEW_SCORES else (4 * FEW_SCORES, 8)
    return max(1, scores // width), warps


def _empty_choice(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    experts = torch.empty(shape, dtype=torch.int32, device=logits.device)
    return experts, torch.empty(shape, dtype=torch.float32, device=logits.device)
