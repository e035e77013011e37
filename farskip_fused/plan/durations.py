"""How long each action and transfer of a layer takes: FLOPs and bytes over rates. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from farskip_fused.errors import UsageError

BYTES = 2  # bfloat16


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer. query_width, key_value_width: heads times head size, of q and of k plus v together;
    for latent attention the up-projected sizes. shared: intermediate size of all shared experts together."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    shared: int
    query_width: int
    key_value_width: int


# Published configurations of the models' repositories.
SHAPES = {
    "deepseek-v2-lite": LayerShape(2048, 1408, 64, 6, 2816, 16 * 192, 16 * (192 + 128)),
    "qwen3-30b-a3b": LayerShape(2048, 768, 128, 8, 0, 32 * 128, 2 * 4 * 128),
}


@dataclass(frozen=True)
class Cluster:
    """Rates of one GPU and its link. tflops: dense bf16 peak; link: GB/s a direction and GPU."""

    tflops: float
    link: float


# Datasheets: H100 SXM 989 TFLOP/s bf16 dense, NVLink 4 900 GB/s both directions; 400 Gb/s InfiniBand.
CLUSTERS = {"h100-nvlink4": Cluster(989, 450), "h100-ib400": Cluster(989, 50)}
# The share of the datasheet's peak that a large bf16 matrix product reaches; expert GEMMs of a layer reach less.
ACHIEVED = 0.6


@dataclass(frozen=True)
class Durations:
    """Milliseconds of each action (by its name in ``schedule.py``) and of each transfer."""

    actions: dict[str, float]
    transfers: dict[str, float]


def distinct_remote_ranks(experts: int, top_k: int, ranks: int) -> float:
    """Expected number of other ranks that a token goes to under uniform routing without repeats."""
    local = experts // ranks
    return (ranks - 1) * (1 - comb(experts - local, top_k) / comb(experts, top_k))


def estimate(shape: LayerShape, cluster: Cluster, *, tokens: int, sequence: int, ranks: int) -> Durations:
    """Forward durations of one layer on ``ranks`` GPUs, each with ``tokens`` tokens in sequences of ``sequence``.

    A row crosses the link once for each rank that needs it, both ways (results summed per rank before they travel).
    Raises UsageError where the experts do not divide over the ranks.
    """
    if ranks < 1 or shape.experts % ranks:
        raise UsageError(f"{shape.experts} experts do not divide over {ranks} ranks.")
    if not 1 <= sequence <= tokens:
        raise UsageError(
            f"Sequences of {sequence} of {tokens} tokens were asked for; from 1 to all tokens are possible."
        )
    rate = cluster.tflops * ACHIEVED * 1e9  # FLOPs a millisecond

    def matmul(inputs: int, outputs: int) -> float:
        return 2 * tokens * inputs * outputs / rate

    causal_half = 0.5
    core = 2 * 2 * tokens * sequence * shape.query_width * causal_half / rate
    row = distinct_remote_ranks(shape.experts, shape.top_k, ranks) * tokens * shape.hidden * BYTES
    transfer = row / (cluster.link * 1e6)
    return Durations(
        actions={
            "attention_projections": matmul(shape.hidden, shape.query_width + shape.key_value_width),
            "attention_core": core + matmul(shape.query_width, shape.hidden),
            "finish_combine": 0.0,
            "start_dispatch": matmul(shape.hidden, shape.experts),
            "experts": 3 * matmul(shape.hidden, shape.intermediate) * shape.top_k,
            "shared_experts": 3 * matmul(shape.hidden, shape.shared),
        },
        transfers={"dispatch": transfer, "combine": transfer},
    )
