"""Router: from logits to the top-k experts of each token and their weights, and the gradient of the logits.

Softmax or sigmoid scores, DeepSeek-V3's selection bias and group-limited choice, optional normalisation over the
chosen experts. Sources: DeepSeek-V2 (arXiv 2405.04434, device-limited routing), DeepSeek-V3 (arXiv 2412.19437,
section 2.1.2, auxiliary-loss-free balancing). Ties go to the lower expert id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .machine import padded

NORMALISATION_EPSILON = tl.constexpr(1e-20)
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _scores(logits, valid, SIGMOID: tl.constexpr):
    if SIGMOID:
        return tl.where(valid, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
    shifted = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return shifted / tl.sum(shifted, axis=1)[:, None]


@triton.jit(do_not_specialize=["tokens"])
def _route_forward(
    logits, bias, experts, weights, tokens,
    scaling,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    TWO_PER_GROUP: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, GROUPS_PADDED: tl.constexpr, GROUP_SIZE_PADDED: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
):  # fmt: skip
    GROUP_SIZE: tl.constexpr = NUM_EXPERTS // GROUPS
    WIDTH: tl.constexpr = GROUPS_PADDED * GROUP_SIZE_PADDED
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_range = token < tokens
    # Experts lie as [group, member], both padded, so that groups of any size are one reshape away.
    column = tl.arange(0, WIDTH)
    group, member = column // GROUP_SIZE_PADDED, column % GROUP_SIZE_PADDED
    exists = (group < GROUPS) & (member < GROUP_SIZE)
    expert = group * GROUP_SIZE + member
    valid = in_range[:, None] & exists[None, :]
    row = tl.load(logits + token[:, None] * NUM_EXPERTS + expert[None, :], mask=valid, other=float("-inf"))
    # A block past the last token would divide by zero.
    row = tl.where(in_range[:, None], row.to(tl.float32), 0.0)
    scores = _scores(row, exists[None, :] & in_range[:, None], SIGMOID)
    choice = scores
    if HAS_BIAS:
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

    position = tl.arange(0, TOP_K_PADDED)
    chosen = tl.zeros((BLOCK_TOKENS, TOP_K_PADDED), tl.int32)
    chosen_score = tl.zeros((BLOCK_TOKENS, TOP_K_PADDED), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(choice, axis=1)
        hit = column[None, :] == best[:, None]
        here = position[None, :] == k
        chosen += tl.where(here, ((best // GROUP_SIZE_PADDED) * GROUP_SIZE + best % GROUP_SIZE_PADDED)[:, None], 0)
        chosen_score += tl.where(here, tl.sum(tl.where(hit, scores, 0.0), axis=1)[:, None], 0.0)
        choice = tl.where(hit, float("-inf"), choice)
    if NORMALISE:
        chosen_score = chosen_score / (tl.sum(chosen_score, axis=1)[:, None] + NORMALISATION_EPSILON)
    at = token[:, None] * TOP_K + position[None, :]
    mask = in_range[:, None] & (position < TOP_K)[None, :]
    tl.store(experts + at, chosen, mask=mask)
    tl.store(weights + at, chosen_score * scaling, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _route_backward(
    logits, experts, weights_gradient, logits_gradient, tokens,
    scaling,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_range = token < tokens
    column = tl.arange(0, WIDTH)
    exists = column < NUM_EXPERTS
    valid = in_range[:, None] & exists[None, :]
    at = token[:, None] * NUM_EXPERTS + column[None, :]
    row = tl.load(logits + at, mask=valid, other=float("-inf"))
    row = tl.where(in_range[:, None], row.to(tl.float32), 0.0)
    scores = _scores(row, valid, SIGMOID)

    # With s the chosen scores and S their sum, w_k = c s_k / S gives ds_k = c (dw_k - sum_j dw_j s_j / S) / S.
    total = tl.zeros((BLOCK_TOKENS,), tl.float32) + NORMALISATION_EPSILON
    weighted = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(experts + token * TOP_K + k, mask=in_range, other=-1)
        gradient = tl.load(weights_gradient + token * TOP_K + k, mask=in_range, other=0.0)
        score = tl.sum(tl.where(column[None, :] == expert[:, None], scores, 0.0), axis=1)
        total += score
        weighted += gradient * score
    scores_gradient = tl.zeros((BLOCK_TOKENS, WIDTH), tl.float32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(experts + token * TOP_K + k, mask=in_range, other=-1)
        gradient = tl.load(weights_gradient + token * TOP_K + k, mask=in_range, other=0.0)
        if NORMALISE:
            gradient = (gradient - weighted / total) / total
        scores_gradient += tl.where(column[None, :] == expert[:, None], (gradient * scaling)[:, None], 0.0)
    if SIGMOID:
        result = scores_gradient * scores * (1.0 - scores)
    else:
        result = scores * (scores_gradient - tl.sum(scores * scores_gradient, axis=1)[:, None])
    tl.store(logits_gradient + at, result, mask=valid)


def route_forward(
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
    """Choose ``top_k`` experts a token.

    logits: [T, E] float32. bias: [E] added to the scores for the choice alone, or None.
    The groups of sigmoid routing are ranked by their two best members (DeepSeek-V3), of softmax routing by their best
    (DeepSeek-V2).
    Returns experts [T, K] int32 by falling choice, and weights [T, K] float32.
    """
    tokens, num_experts = logits.shape
    experts = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    groups_padded, group_size_padded = padded(groups), padded(num_experts // groups)
    block = _block_tokens(groups_padded * group_size_padded)
    _route_forward[(max(triton.cdiv(tokens, block), 1),)](
        logits, bias, experts, weights, tokens, scaling,
        NUM_EXPERTS=num_experts, TOP_K=top_k, GROUPS=groups, TOP_GROUPS=top_groups,
        TWO_PER_GROUP=sigmoid and num_experts // groups > 1, SIGMOID=sigmoid, NORMALISE=normalise,
        HAS_BIAS=bias is not None, BLOCK_TOKENS=block,
        GROUPS_PADDED=groups_padded, GROUP_SIZE_PADDED=group_size_padded, TOP_K_PADDED=padded(top_k),
    )  # fmt: skip
    return experts, weights


def route_backward(
    logits: Tensor, experts: Tensor, weights_gradient: Tensor, *, sigmoid: bool, normalise: bool, scaling: float
) -> Tensor:
    """Gradient of the logits [T, E] float32 from that of the weights [T, K]; the choice itself has none."""
    tokens, num_experts = logits.shape
    result = torch.empty_like(logits)
    width = padded(num_experts)
    block = _block_tokens(width)
    _route_backward[(max(triton.cdiv(tokens, block), 1),)](
        logits, experts, weights_gradient.contiguous(), result, tokens, scaling,
        NUM_EXPERTS=num_experts, TOP_K=experts.shape[1], SIGMOID=sigmoid, NORMALISE=normalise,
        BLOCK_TOKENS=block, WIDTH=width,
    )  # fmt: skip
    return result


def _block_tokens(width: int) -> int:
    return max(1, min(32, 2048 // width))
