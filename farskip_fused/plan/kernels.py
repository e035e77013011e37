"""How long single kernels take: rates of a cluster times the share of them that a kernel of that shape reaches.

Each share comes from a measurement named beside it and is taken for every GPU; tests/plan/test_kernels.py holds those
of our own kernels to bench/results. All times in ms.
"""

from __future__ import annotations

from dataclasses import dataclass

from farskip_fused.plan.clusters import Cluster

# One launch, and the gap before it: a decoded token's expert layer takes 13 us more than its weights need to be read,
# in 7 launches (bench/results/h100-experts-decode.json, one token).
LAUNCH = 0.002
# Our expert layer: 1 / share of ``Cluster.matmul``, forward and backward, launches and sorting, and how far arithmetic
# and memory traffic overlap (as the exponent of their norm; 1 would be not at all). Least worst error over both files
# of bench/results: 5.4 % forward (22 points), 3.5 % backward (4 points).
EXPERTS_FORWARD, EXPERTS_BACKWARD, EXPERTS_FIXED, OVERLAP = 1.16, 1.21, 0.015, 1.2
# A dense product's tile costs as if its inner dimension were this much longer: prologue and epilogue. From "dense" in
# bench/results/h100-experts-fine-grained.json (84 to 89 % of the ceiling at inner dimensions of 768 to 2048).
TILE_OVERHEAD = 240
# FlashAttention-3 on an H100, forward, head size 128, not causal (pytorch/benchmark #2391): 430, 517, 566, 590, 614,
# 621 TFLOP/s at 512 to 16384 tokens, which is 0.80 of ``matmul`` times s / (s + 240). Causal keeps s / (s + 900) of
# that, and backward 0.85 (FlashAttention-4 on a B200, Dao-AILab/flash-attention #2605 and #2280).
ATTENTION_SHARE, ATTENTION_HALF, CAUSAL_HALF, ATTENTION_BACKWARD = 0.80, 240, 900, 0.85
# Products of the backward pass over those of the forward pass: Q K^T is computed again.
ATTENTION_BACKWARD_PRODUCTS = 2.5


@dataclass(frozen=True)
class Machine:
    """A cluster's GPU at a precision."""

    cluster: Cluster
    fp8: bool = False

    @property
    def weight_bytes(self) -> int:
        """Of a number that goes into a product."""
        return 1 if self.fp8 else 2

    def _products(self, flops: float) -> float:
        return flops / ((self.cluster.matmul_fp8 if self.fp8 else self.cluster.matmul) * 1e9)

    def memory(self, numbers: float, kernels: int = 1) -> float:
        """Kernels bound by memory that read and write so many bytes in all."""
        return numbers / (self.cluster.memory * 1e9) + kernels * LAUNCH

    def matmul(self, rows: float, inner: float, columns: float) -> float:
        """A dense product, activations [rows, inner] times weights [inner, columns]; 0 without either dimension."""
        if not columns or not inner:
            return 0.0
        arithmetic = self._products(2 * rows * inner * columns) * (1 + TILE_OVERHEAD / inner)
        traffic = self.weight_bytes * (rows * inner + inner * columns) + 2 * rows * columns
        return max(arithmetic, self.memory(traffic, 0)) + LAUNCH

    def experts(self, rows: float, hidden: int, intermediate: float, active: float, *, backward: bool = False) -> float:
        """A rank's routed experts: ``rows`` rows through ``active`` experts' matrices, both directions' own kernels."""
        passes = 2 if backward else 1
        slowdown = EXPERTS_BACKWARD if backward else EXPERTS_FORWARD
        arithmetic = slowdown * self._products(passes * 6 * rows * hidden * intermediate)
        weights = passes * active * 3 * hidden * intermediate * self.weight_bytes
        gathered = passes * rows * hidden * 2
        return _norm(arithmetic, self.memory(weights, 0)) + self.memory(gathered, 0) + EXPERTS_FIXED

    def attention(self, flops: float, length: float, *, backward: bool = False) -> float:
        """Causal attention over sequences of ``length``; ``flops`` of what is not masked, forward. Always bfloat16."""
        share = ATTENTION_SHARE * self.cluster.attention * length / (length + ATTENTION_HALF)
        share *= length / (length + CAUSAL_HALF)
        time = flops / (self.cluster.matmul * 1e9 * share)
        return time * ATTENTION_BACKWARD_PRODUCTS / ATTENTION_BACKWARD if backward else time


def _norm(arithmetic: float, traffic: float) -> float:
    return (arithmetic**OVERLAP + traffic**OVERLAP) ** (1 / OVERLAP)
