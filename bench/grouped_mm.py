# Device code carries no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""torch's grouped_mm as an expert layer, in as good a pipeline as it can be given.

Sorting without a host synchronisation, rows permuted, two grouped products, and fused kernels for what is between them:
SwiGLU, the weighted sum and their gradients. Plain torch operations there cost as much again as the products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Before the kernels below are defined: it decides whether they are compiled or interpreted.
from farskip_fused.kernels.gather_sum import sum_entries
from farskip_fused.kernels.machine import INTERPRETED

ROWS = 64 if INTERPRETED else 4
COLUMNS = 256
HIDDEN_BLOCK = 1024


@triton.jit(do_not_specialize=["rows"])
def _swiglu(gate_up, activated, rows, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < SIZE)
    at = gate_up + row * (2 * SIZE) + column
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + SIZE, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(activated + row * SIZE + column, value.to(activated.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_backward(
    gate_up, gradient, gate_up_gradient, rows, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < SIZE)
    at = row * (2 * SIZE) + column
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + SIZE, mask=mask, other=0.0).to(tl.float32)
    outer = tl.load(gradient + row * SIZE + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    element = gate_up_gradient.dtype.element_ty
    through_gate = outer * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(gate_up_gradient + at, through_gate.to(element), mask=mask)
    tl.store(gate_up_gradient + at + SIZE, (outer * gate * sigmoid).to(element), mask=mask)


@triton.jit
def _weighted_sum_backward(
    gradient, values, places, weights, values_gradient, weights_gradient,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(TOP_K):
        place = tl.load(places + token * TOP_K + k).to(tl.int64)
        weight = tl.load(weights + token * TOP_K + k)
        product = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, HIDDEN, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < HIDDEN
            outer = tl.load(gradient + token * HIDDEN + column, mask=mask, other=0.0).to(tl.float32)
            at = place * HIDDEN + column
            product += outer * tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(values_gradient + at, (outer * weight).to(values_gradient.dtype.element_ty), mask=mask)
        tl.store(weights_gradient + token * TOP_K + k, tl.sum(product))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return rows.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return sum_entries(gradient.contiguous(), ctx.saved_tensors[0], None), None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        activated = gate_up.new_empty(rows, size)
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(size, COLUMNS))
        _swiglu[grid](gate_up, activated, rows, SIZE=size, ROWS=ROWS, COLUMNS=COLUMNS)
        return activated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        rows, size = gradient.shape
        result = torch.empty_like(gate_up)
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(size, COLUMNS))
        _swiglu_backward[grid](gate_up, gradient.contiguous(), result, rows, SIZE=size, ROWS=ROWS, COLUMNS=COLUMNS)
        return result


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(values, places, weights)
        return sum_entries(values, places, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
        values, places, weights = ctx.saved_tensors
        values_gradient, weights_gradient = torch.empty_like(values), torch.empty_like(weights)
        _weighted_sum_backward[(places.shape[0],)](
            gradient.contiguous(), values, places, weights, values_gradient, weights_gradient,
            HIDDEN=values.shape[1], TOP_K=places.shape[1], BLOCK=HIDDEN_BLOCK,
        )  # fmt: skip
        return values_gradient, None, weights_gradient


def grouped_mm_experts(hidden_states: Tensor, index: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Expert layer [T, H]: hidden_states [T, H], index [T, K] int32 with every entry routed, weights [T, K] float32."""
    num_experts, entries, device = w13.shape[0], index.numel(), index.device
    # A radix sort takes a pass for every eight bits.
    keys = index.flatten().to(torch.int16 if num_experts < 2**15 else torch.int32)
    keys, order = keys.sort()
    experts = torch.arange(num_experts, dtype=keys.dtype, device=device)
    ends = torch.searchsorted(keys, experts, right=True, out_int32=True)
    places = torch.empty(entries, dtype=torch.int32, device=device)
    places.scatter_(0, order, torch.arange(entries, dtype=torch.int32, device=device))
    places = places.view_as(index)
    rows = _Permute.apply(hidden_states, order // index.shape[1], places)
    gate_up = torch._grouped_mm(rows, w13.transpose(1, 2), offs=ends)
    values = torch._grouped_mm(_Swiglu.apply(gate_up), w2.transpose(1, 2), offs=ends)
    return _WeightedSum.apply(values, places, weights)
