"""`farskip bench experts`: the expert layer on one rank against dense cuBLAS of the same FLOPs and torch's grouped_mm.

FLOPs: forward 6 T K H I, forward and backward 18 T K H I. ``dense`` is the limit: one matrix product of the same size a
GEMM. ``grouped_mm`` is permute, torch's grouped_mm twice, SwiGLU and the weighted sum, as transformers runs it. Ours
includes layout, dispatch into the slots of a world of one, and combine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from farskip_fused.errors import UsageError
from farskip_fused.moe import FusedExperts

SHAPES = {  # hidden, intermediate, experts, top-k
    "deepseek-v2-lite": (2048, 1408, 64, 6),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
}


def milliseconds(run: Callable[[], Any], warm_up: int = 3, repeats: int = 15) -> tuple[float, float]:
    """Median and spread (half of the range between the quartiles) of CUDA-event times."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    low, _, high = statistics.quantiles(times, n=4)
    return statistics.median(times), (high - low) / 2


def grouped_mm_experts(x: Tensor, index: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    order = index.flatten().argsort(stable=True)
    ends = torch.bincount(index.flatten(), minlength=w13.shape[0]).cumsum(0).to(torch.int32)
    token = order // index.shape[1]
    gate, up = torch._grouped_mm(x[token], w13.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    output = torch._grouped_mm(silu(gate) * up, w2.transpose(1, 2), offs=ends)
    scattered = torch.empty_like(output).index_copy(0, order, output)
    return (scattered.unflatten(0, index.shape) * weights[..., None].to(output.dtype)).sum(dim=1)


def measure(shape: str, tokens: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Times of one shape: its sizes, and {"forward", "forward_backward"} each {name: {ms, spread_ms, tflops}}."""
    hidden, intermediate, num_experts, top_k = SHAPES[shape]
    layer = FusedExperts(hidden, intermediate, num_experts, top_k, max_tokens=tokens, device="cuda", dtype=dtype)
    layer.setup()
    x = torch.randn(tokens, hidden, device="cuda", dtype=dtype, requires_grad=True)
    weights = torch.rand(tokens, top_k, device="cuda", requires_grad=True)
    index = torch.rand(tokens, num_experts, device="cuda").argsort(dim=-1)[:, :top_k].contiguous()
    gradient = torch.randn(tokens, hidden, device="cuda", dtype=dtype)
    ours = layer(x, index, weights)
    theirs = grouped_mm_experts(x, index, weights, layer.w13, layer.w2)
    error = float((ours - theirs).detach().float().norm() / theirs.detach().float().norm())
    if not error < 2e-2:
        raise RuntimeError(f"{shape}: the two expert layers differ by {error:.3g}")

    rows = tokens * top_k
    a, b = (torch.randn(rows, size, device="cuda", dtype=dtype) for size in (hidden, intermediate))
    up, down = layer.w13[0].detach(), layer.w2[0].detach()
    h = a @ up.T

    def dense_forward() -> None:
        torch.mm(a, up.T)
        torch.mm(b, down.T)

    def dense_both() -> None:
        dense_forward()
        torch.mm(a, down), torch.mm(h, up), torch.mm(h.T, a), torch.mm(a.T, b)

    def both(run: Callable[..., Tensor], *extra: Tensor) -> Callable[[], Any]:
        parameters = (x, weights, layer.w13, layer.w2)
        return lambda: torch.autograd.grad(run(x, index, weights, *extra), parameters, gradient)

    def forward(run: Callable[..., Tensor], *extra: Tensor) -> Callable[[], Any]:
        def call() -> None:
            with torch.no_grad():
                run(x, index, weights, *extra)

        return call

    runs: dict[str, tuple[int, dict[str, Callable[[], Any]]]] = {}
    directions = ("forward", 6, dense_forward, forward), ("forward_backward", 18, dense_both, both)
    for direction, factor, dense, timed in directions:
        grouped_mm = timed(grouped_mm_experts, layer.w13, layer.w2)
        runs[direction] = factor, {"dense": dense, "grouped_mm": grouped_mm, "ours": timed(layer)}
    report: dict[str, Any] = {
        "shape": shape, "hidden": hidden, "intermediate": intermediate, "experts": num_experts, "top_k": top_k,
        "tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "device": torch.cuda.get_device_name(),
    }  # fmt: skip
    for direction, (factor, variants) in runs.items():
        flops = factor * rows * hidden * intermediate
        report[direction] = {}
        for name, run in variants.items():
            ms, spread = milliseconds(run)
            report[direction][name] = {"ms": ms, "spread_ms": spread, "tflops": flops / ms * 1e-9}
    return report


def run(shapes: list[str], tokens: int) -> list[dict[str, Any]]:
    """Measure the named shapes. Raises UsageError without a GPU or for an unknown shape."""
    if not torch.cuda.is_available():
        raise UsageError("farskip bench experts measures a CUDA GPU and this machine has none.")
    unknown = [shape for shape in shapes if shape not in SHAPES]
    if unknown:
        raise UsageError(f"Unknown shape {unknown[0]!r}; use {', '.join(SHAPES)}.")
    return [measure(shape, tokens) for shape in shapes]


def render(reports: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("shape", "tokens", "direction", "layer", "ms", "± ms", "TFLOP/s", "of dense")
    for report in reports:
        for direction in ("forward", "forward_backward"):
            dense = report[direction]["dense"]["ms"]
            for name, cell in report[direction].items():
                table.add_row(
                    report["shape"], str(report["tokens"]), direction, name, f"{cell['ms']:.3f}",
                    f"{cell['spread_ms']:.3f}", f"{cell['tflops']:.0f}", f"{dense / cell['ms']:.0%}",
                )  # fmt: skip
    Console().print(table)
