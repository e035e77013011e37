"""Router logits: hidden states times the gate's weight, in float32 quality whatever the dtypes.

Products of two bfloat16 or two float16 values are exact in float32, so those multiply as they are; everything else is
taken to float32 and multiplied by three tensor-core products (tf32x3), which keeps float32's accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launchable import Kernel
from .machine import INTERPRETED, ceil_div, padded

SMALLEST_TILE = 16  # of a dot
# More programs than that, one on each SM of a large GPU, only add to what is summed.
SPLIT_PROGRAMS = 128
MAXIMUM_SPLITS = 8


@dataclass(frozen=True)
class GateTile:
    """Block sizes of the product: tokens, experts, depth of a step; and how it is launched."""

    tokens: int
    experts: int
    depth: int
    warps: int
    stages: int

    def sizes(self, hidden_states: Tensor, weight: Tensor) -> dict[str, object]:
        """Its compile-time arguments."""
        return {
            "GATE_TOKENS": self.tokens, "GATE_EXPERTS": self.experts, "GATE_DEPTH": self.depth,
            "AS_FLOAT32": not multiplies_as_is(hidden_states.dtype, weight.dtype),
            "PRECISION": "ieee" if INTERPRETED else "tf32x3",
        }  # fmt: skip


def multiplies_as_is(hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> bool:
    """Whether the dot takes both dtypes and its products are exact; the interpreter has no bfloat16 dot."""
    halves = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
    return hidden_dtype == weight_dtype and hidden_dtype in halves


@triton.jit
def gate_tile(
    hidden_states, weight, token, tokens, first_expert, first_depth, end_depth,
    NUM_EXPERTS: tl.constexpr, HIDDEN: tl.constexpr, GATE_TOKENS: tl.constexpr, GATE_EXPERTS: tl.constexpr,
    GATE_DEPTH: tl.constexpr, AS_FLOAT32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of a block of tokens and experts, summed over the depth [first_depth, end_depth)."""
    in_range = (token < tokens)[:, None]
    expert = first_expert + tl.arange(0, GATE_EXPERTS)
    exists = (expert < NUM_EXPERTS)[None, :]
    total = tl.zeros((GATE_TOKENS, GATE_EXPERTS), tl.float32)
    for start in range(first_depth, end_depth, GATE_DEPTH):
        depth = start + tl.arange(0, GATE_DEPTH)
        x_at = hidden_states + token[:, None] * HIDDEN + depth[None, :]
        w_at = weight + expert[None, :] * HIDDEN + depth[:, None]
        if HIDDEN % GATE_DEPTH == 0:
            x = tl.load(x_at, mask=in_range, other=0.0)
            w = tl.load(w_at, mask=exists, other=0.0)
        else:
            x = tl.load(x_at, mask=in_range & (depth < HIDDEN)[None, :], other=0.0)
            w = tl.load(w_at, mask=exists & (depth < HIDDEN)[:, None], other=0.0)
        if AS_FLOAT32:
            x, w = x.to(tl.float32), w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    return total


@Kernel
@triton.jit(do_not_specialize=["tokens"])
def _gate(
    hidden_states, weight, partials, tokens,
    NUM_EXPERTS: tl.constexpr, HIDDEN: tl.constexpr, SPLIT_DEPTH: tl.constexpr, GATE_TOKENS: tl.constexpr,
    GATE_EXPERTS: tl.constexpr, GATE_DEPTH: tl.constexpr, AS_FLOAT32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * GATE_TOKENS + tl.arange(0, GATE_TOKENS)
    expert = tl.program_id(1) * GATE_EXPERTS + tl.arange(0, GATE_EXPERTS)
    split = tl.program_id(2)
    first_depth = split * SPLIT_DEPTH
    total = gate_tile(
        hidden_states, weight, token, tokens, tl.program_id(1) * GATE_EXPERTS,
        first_depth, tl.minimum(first_depth + SPLIT_DEPTH, HIDDEN),
        NUM_EXPERTS, HIDDEN, GATE_TOKENS, GATE_EXPERTS, GATE_DEPTH, AS_FLOAT32, PRECISION,
    )  # fmt: skip
    at = partials + (split.to(tl.int64) * tokens + token[:, None]) * NUM_EXPERTS + expert[None, :]
    tl.store(at, total, mask=(token < tokens)[:, None] & (expert < NUM_EXPERTS)[None, :])


def split_logits(hidden_states: Tensor, weight: Tensor, most_tokens: int) -> Tensor:
    """Logits [S, T, E] float32 whose sum over S is the logits: few tokens, the depth split over programs.

    hidden_states: [T, H]; weight: [E, H]; contiguous. S follows from the shape and ``most_tokens``, at least T.
    """
    tokens, hidden = hidden_states.shape
    num_experts = weight.shape[0]
    tile = split_tile(hidden_states.dtype, weight.dtype)
    # Whole steps: the last split may have fewer, or none.
    split_depth = ceil_div(ceil_div(hidden, split_count(weight, most_tokens, tile)), tile.depth) * tile.depth
    splits = ceil_div(hidden, split_depth)
    partials = torch.empty(splits, tokens, num_experts, dtype=torch.float32, device=weight.device)
    grid = (max(ceil_div(tokens, tile.tokens), 1), ceil_div(num_experts, tile.experts), splits)
    _gate[grid](
        hidden_states, weight, partials, tokens, NUM_EXPERTS=num_experts, HIDDEN=hidden, SPLIT_DEPTH=split_depth,
        **tile.sizes(hidden_states, weight), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partials


def split_count(weight: Tensor, most_tokens: int, tile: GateTile) -> int:
    """Into how many parts the depth is split: what fills the GPU, while each program has two steps of it."""
    programs = ceil_div(most_tokens, tile.tokens) * ceil_div(weight.shape[0], tile.experts)
    return max(1, min(MAXIMUM_SPLITS, SPLIT_PROGRAMS // programs, weight.shape[1] // (2 * tile.depth)))


def split_tile(hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> GateTile:
    """For few tokens: many programs, each with a long row of the weight."""
    if INTERPRETED:
        return GateTile(SMALLEST_TILE, 64, 256, 4, 1)
    depth = 128 if multiplies_as_is(hidden_dtype, weight_dtype) else 64
    return GateTile(SMALLEST_TILE, SMALLEST_TILE, depth, 4, 4)


def whole_tile(hidden_states: Tensor, weight: Tensor, most_tokens: int) -> GateTile:
    """For many tokens: all experts at once where they fit, so that hidden states are read once.

    most_tokens: an upper bound of the tokens. A program takes 16 of them while that gives no more programs than a GPU
    has SMs, later 64 or 128, the rows of Hopper's tensor-core instruction.
    """
    experts = max(padded(weight.shape[0]), SMALLEST_TILE)
    if INTERPRETED:
        return GateTile(128, experts, 256, 4, 1)
    as_is = multiplies_as_is(hidden_states.dtype, weight.dtype)
    experts = min(experts, 256 if as_is else 128)
    tokens = 16 if most_tokens <= 2048 else 64 if most_tokens < 16384 or not as_is else 128
    depth = (128 if tokens == 16 else 64) if as_is else 32
    bytes_of_stage = (tokens + experts) * depth * max(hidden_states.element_size(), weight.element_size())
    stages = max(2, min(4, _shared_memory(hidden_states.device) // bytes_of_stage))
    return GateTile(tokens, experts, depth, 4 if tokens == 16 else 8, stages)


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may use for its stages; what is left serves reductions."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) - 8192
