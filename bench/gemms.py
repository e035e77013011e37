"""`farskip bench experts --gemms`: the kernels of our expert layer one by one, each in isolation.

A CUDA graph repeats each, so that launching costs nothing; what a kernel reads is in the cache if it fits there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farskip_fused.bench import timing
from farskip_fused.bench.peers import Problem, make_experts
from farskip_fused.bench.shapes import ZIPF, Shape
from farskip_fused.kernels import experts as forward_kernels
from farskip_fused.kernels import experts_backward, gather_sum
from farskip_fused.local_experts import sort_entries
from farskip_fused.router import Router

CALLS = 4


class Kernel(NamedTuple):
    """A launch, its FLOPs (0 where moving bytes is all it does) and the bytes that it must move."""

    call: Callable[[], Any]
    flops: int
    moved: int


def measure(name: str, shape: Shape, token_counts: Sequence[int], skewed: bool = False) -> list[dict[str, Any]]:
    """One row a number of tokens and kernel: ms, TFLOP/s of products, TB/s of what must move."""
    experts = make_experts(shape, max(token_counts))
    router = Router(shape.hidden, shape.experts, shape.top_k, device=experts.w13.device, dtype=experts.w13.dtype)
    rows = []
    for tokens in token_counts:
        problem = Problem.random(shape, tokens, experts.w13, experts.w2, ZIPF if skewed else 0.0)
        with torch.no_grad():
            launches = kernels(shape, problem, router)
            graphs = {kernel: timing.capture([launch.call] * CALLS) for kernel, launch in launches.items()}
            times = timing.interleave(graphs, budget_ms=3000.0)
        for kernel, launch in launches.items():
            time = times[kernel].over(CALLS)
            rows.append({
                "shape": name, "tokens": tokens, "routing": f"Zipf {ZIPF:g}" if skewed else "uniform",
                "kernel": kernel, "ms": time.ms, "spread_ms": time.spread_ms,
                "tflops": launch.flops / time.ms * 1e-9, "terabytes": launch.moved / time.ms * 1e-9,
            })  # fmt: skip
    return rows


def kernels(shape: Shape, problem: Problem, router: Router) -> dict[str, Kernel]:
    """Every launcher of the layer with the operands that it has there, by name and in its order."""
    hidden_states, w13, w2 = problem.hidden_states.detach(), problem.w13.detach(), problem.w2.detach()
    weights, gradient, index = problem.weights.detach(), problem.output_gradient, problem.index
    top_k, product = shape.top_k, 2 * problem.index.numel() * shape.hidden * shape.intermediate
    layout = sort_entries(hidden_states, index, w13)
    gate_up, activated = forward_kernels.up_swiglu(hidden_states, layout, top_k, w13, True)
    assert gate_up is not None
    values = forward_kernels.project(activated, layout, w2, 1)
    gate_up_gradient, weighted, parts = experts_backward.down_gradient_swiglu(gradient, weights, layout, w2, gate_up)
    row_gradients = forward_kernels.project(gate_up_gradient, layout, w13, 2)
    weight_gradient = experts_backward.weight_gradient

    def size(*tensors: Tensor) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    rows, sums = size(hidden_states), size(hidden_states, index, weights)
    logits = router.weight.shape[0] * problem.index.shape[0]
    return {
        "router": Kernel(lambda: router(hidden_states), 2 * logits * shape.hidden, rows + size(router.weight)),
        "layout": Kernel(lambda: sort_entries(hidden_states, index, w13), 0, 3 * size(index)),
        "up + SwiGLU": Kernel(
            lambda: forward_kernels.up_swiglu(hidden_states, layout, top_k, w13, True),
            2 * product, rows + size(w13, gate_up, activated),
        ),
        "up + SwiGLU, inference": Kernel(
            lambda: forward_kernels.up_swiglu(hidden_states, layout, top_k, w13, False),
            2 * product, rows + size(w13, activated),
        ),
        "down": Kernel(
            lambda: forward_kernels.project(activated, layout, w2, 1), product, size(activated, w2, values)
        ),
        "weighted sum": Kernel(
            lambda: gather_sum.sum_entries(values, layout.places, weights), 0, sums + size(values)
        ),
        "down gradient + dSwiGLU": Kernel(
            lambda: experts_backward.down_gradient_swiglu(gradient, weights, layout, w2, gate_up),
            product, rows + size(w2, gate_up, gate_up_gradient, weighted, parts),
        ),
        "router-weight gradient": Kernel(
            lambda: gather_sum.sum_parts(parts, layout.places), 0, size(parts, index, weights)
        ),
        "up gradient": Kernel(
            lambda: forward_kernels.project(gate_up_gradient, layout, w13, 2),
            2 * product, size(gate_up_gradient, w13, row_gradients),
        ),
        "input gradient": Kernel(
            lambda: gather_sum.sum_entries(row_gradients, layout.places, None), 0, sums + size(row_gradients)
        ),
        "w13 gradient": Kernel(
            lambda: weight_gradient(gate_up_gradient, hidden_states, layout, top_k, False),
            2 * product, rows + size(gate_up_gradient, w13),
        ),
        "w2 gradient": Kernel(
            lambda: weight_gradient(gradient, weighted, layout, top_k, True), product, rows + size(weighted, w2)
        ),
    }  # fmt: skip
