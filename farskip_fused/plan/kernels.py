"""How long single kernels take: rates of a cluster times the share of them that a kernel of that shape reaches.

Each share comes from a measurement named beside it and is taken for every GPU; tests/plan/test_kernels.py holds those
of our own kernels to bench/results. All times in ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from farskip_fused.plan.clusters import Cluster

# One launch, and the gap before it: a decoded token's expert layer takes 8 to 9 us more than its weights need to be
# read, in 3 launches (bench/results/h100-experts-decode.json, one token), part of which is each kernel's first loads.
LAUNCH = 0.002
# Our expert layer: 1 / share of ``Cluster.matmul``, forward and backward, launches and sorting, and how far arithmetic
# and memory traffic overlap (as the exponent of their norm; 1 would be not at all). Least worst error over both files
# of bench/results: 4.5 % forward (17 points), 3.5 % backward (4 points).
EXPERTS_FORWARD, EXPERTS_BACKWARD, EXPERTS_FIXED, OVERLAP = 1.16, 1.21, 0.015, 1.2
# Tiles of a dense product, of which every multiprocessor computes one at a time: the largest that cuBLAS has on Hopper,
# either way round, cut to the result in steps of TILE_STEP. Where they fill the last wave badly, the inner dimension is
# split and the parts, in float32, are summed.
TILES, TILE_STEP, SPLITS = ((128, 256), (256, 128)), 64, (1, 2, 3, 4)
# A tile costs as if its inner dimension were this much longer: prologue and epilogue. From "dense" in
# bench/results/h100-experts-fine-grained.json (84 to 89 % of the ceiling at inner dimensions of 768 to 2048).
TILE_OVERHEAD = 240
# FlashAttention-3 on an H100, forward, head size 128, not causal (pytorch/benchmark #2391): 430, 517, 566, 590, 614,
# 621 TFLOP/s at 512 to 16384 tokens, which is 0.80 of ``matmul`` times s / (s + 240). Causal keeps s / (s + 900) of
# that, and backward 0.85 (FlashAttention-4 on a B200, Dao-AILab/flash-attention #2605 and #2280).
ATTENTION_SHARE, ATTENTION_HALF, CAUSAL_HALF, ATTENTION_BACKWARD = 0.80, 240, 900, 0.85
# Products of the backward pass over those of the forward pass: Q K^T is computed again.
ATTENTION_BACKWARD_PRODUCTS = 2.5
# Norms over ``Cluster.strided``. torch.nn.RMSNorm on an H100, bfloat16, 4096 rows of 1024 to 16384 (Liger-Kernel,
# benchmark/data/all_benchmark_data.csv, "megatron_rms_norm", provider "torch"): forward 0.0128 to 0.1492 ms, which is
# 0.46 x 10^12 numbers/s; backward 0.165, once forward, the sum and its gradient are taken off, which are timed with it.
NORM, NORM_BACKWARD = 0.46 / 0.36, 0.165 / 0.36
NORM_BACKWARD_KERNELS = 3  # gradient of the input; of the weight by parts, and their sum
# Products in float32 without tensor cores over ``matmul``: datasheet of the H100 SXM, TFLOP/s.
FLOAT32_SHARE = 67 / 989


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

    def strided(self, numbers: float, kernels: int = 1) -> float:
        """Kernels that write so many numbers in all, read or written through strided or broadcast tensors."""
        return max(self._written(numbers), self.memory(6 * numbers, 0)) + kernels * LAUNCH

    def norm(self, numbers: float, *, backward: bool = False) -> float:
        """RMSNorm of so many numbers, bfloat16."""
        if backward:
            time = max(self._written(numbers) / NORM_BACKWARD, self.memory(10 * numbers, 0))
            return time + NORM_BACKWARD_KERNELS * LAUNCH
        return max(self._written(numbers) / NORM, self.memory(4 * numbers, 0)) + LAUNCH

    def _written(self, numbers: float) -> float:
        return numbers / (self.cluster.strided * 1e9)

    def matmul_float32(self, rows: float, inner: float, columns: float) -> float:
        """A product of the same sizes in float32 outside the tensor cores."""
        arithmetic = 2 * rows * inner * columns / (self.cluster.matmul * FLOAT32_SHARE * 1e9)
        return max(arithmetic, self.memory(4 * (rows * inner + inner * columns + rows * columns), 0)) + LAUNCH

    def matmul(self, rows: float, inner: float, columns: float) -> float:
        """A dense product, [rows, inner] times [inner, columns]; 0 without either of these dimensions."""
        if not columns or not inner:
            return 0.0
        arithmetic = min(
            self._products(flops) + self.memory(summed, 0)
            for flops, summed in _tilings(rows, inner, columns, self.cluster.processors)
        )
        traffic = self.weight_bytes * (rows * inner + inner * columns) + 2 * rows * columns
        return max(arithmetic, self.memory(traffic, 0)) + LAUNCH

    def linear(self, rows: float, inner: float, columns: float, *, backward: bool = False) -> float:
        """A linear layer's product; backward, those for the gradients of its input and of its weight."""
        if not backward:
            return self.matmul(rows, inner, columns)
        return self.matmul(rows, columns, inner) + self.matmul(inner, rows, columns)

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
    return float((arithmetic**OVERLAP + traffic**OVERLAP) ** (1 / OVERLAP))


@lru_cache(maxsize=4096)
def _tilings(rows: float, inner: float, columns: float, processors: int) -> tuple[tuple[float, float], ...]:
    """Ways to compute a product in waves of tiles, a tile a multiprocessor: FLOPs, those of places in a wave that stay
    empty and of each tile's overhead too, and bytes of the parts that are summed."""
    ways = []
    for tile in TILES:
        height, width = (
            min(most, TILE_STEP * ceil(of / TILE_STEP)) for most, of in zip(tile, (rows, columns), strict=True)
        )
        tiles = ceil(rows / height) * ceil(columns / width)
        for parts in SPLITS:
            places = ceil(tiles * parts / processors) * processors
            flops = places * 2 * height * width * (inner / parts + TILE_OVERHEAD)
            ways.append((flops, 2 * 4 * parts * rows * columns if parts > 1 else 0.0))
    return tuple(ways)
