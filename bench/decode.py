"""`farskip bench experts --decode`: few tokens, under CUDA-graph replay, bound by the weights that are read.

A graph holds several calls on copies of the layer, each with its own tokens and routing, so that no call finds the
weights of the one before in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from farskip_fused.bench import timing
from farskip_fused.bench.peers import Peer, Problem, as_peer, check, make_experts
from farskip_fused.bench.shapes import Shape
from farskip_fused.moe import FusedExperts

CACHES = 4  # times the L2 cache that the copies of what one token reads must exceed
LEAST_CALLS = 8


def copies_needed(shape: Shape, cache_bytes: int) -> int:
    """Layers to rotate among, so that what a single token reads of all of them exceeds the cache several times."""
    return max(2, -(-CACHES * cache_bytes // shape.weight_bytes(shape.top_k)))


def make_copies(shape: Shape, tokens: int) -> list[FusedExperts]:
    """As many layers on the GPU as are rotated."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [make_experts(shape, tokens) for _ in range(copies_needed(shape, cache))]


def rotated(copies: Sequence[FusedExperts]) -> list[FusedExperts]:
    """The layers of a graph's calls: each copy as often as the others."""
    return [*copies] * -(-LEAST_CALLS // len(copies))


def measure(name: str, shape: Shape, token_counts: Sequence[int], peers: Mapping[str, Peer]) -> list[dict[str, Any]]:
    """One row for each number of tokens: ours and vLLM, the peer that serves; weights read in TB/s."""
    copies = make_copies(shape, max(token_counts))
    layers = rotated(copies)
    calls = len(layers)
    rows = []
    for tokens in token_counts:
        problems = [Problem.random(shape, tokens, layer.w13, layer.w2) for layer in layers]
        errors = {}
        if "vllm" in peers:
            errors["vllm"] = check("vllm", peers["vllm"], as_peer(copies[0]), problems[0], backward=False)
        graphs = {"ours": capture(problems, [as_peer(layer) for layer in layers])}
        if "vllm" in peers:
            graphs["vllm"] = capture(problems, [peers["vllm"]] * calls)
        active = sum(shape.weight_bytes(len(problem.index.unique())) for problem in problems) / calls
        row: dict[str, Any] = {"shape": name, "tokens": tokens, "active_bytes": active}
        for layer, whole in timing.interleave(graphs, budget_ms=500.0, fewest=20).items():
            time = whole.over(calls)
            row[layer] = {
                "ms": time.ms, "spread_ms": time.spread_ms, "tflops": shape.flops(tokens, "forward") / time.ms * 1e-9,
                "terabytes": active / time.ms * 1e-9, "error": errors.get(layer, 0.0),
            }  # fmt: skip
        rows.append(row)
    return rows


def capture(problems: Sequence[Problem], layers: Sequence[Peer]) -> Callable[[], Any]:
    def call(problem: Problem, layer: Peer) -> Callable[[], Tensor]:
        return lambda: problem.forward(layer.run)

    return timing.capture([call(*pair) for pair in zip(problems, layers, strict=True)])
