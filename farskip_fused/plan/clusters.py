"""Rates of GPUs and of what connects them: named clusters, and those of a YAML file.

Rates are of one GPU. ``matmul`` and ``memory`` are rates that were measured, not datasheet peaks. Where nothing was
measured for a GPU, its datasheet's peak is taken times the share that an H100 reaches of its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from farskip_fused.errors import UsageError
from farskip_fused.schedule import COMMUNICATION

# bench/results/h100-experts-fine-grained.json, "ceilings": 8192^3 bfloat16 product and device copy on an H100 SXM.
H100_MATMUL, H100_COPY = 787.0, 3.03
# Datasheet of the H100 SXM: dense bfloat16 TFLOP/s, TB/s.
MATMUL_SHARE, COPY_SHARE = H100_MATMUL / 989, H100_COPY / 3.35

# Share of a link's peak that all-to-all kernels reach. Hopper: DeepEP's README, intranode dispatch at 153 GB/s of the
# H800's 200. Blackwell: DeepEP V2, 643 of 900 GB/s with 24 SMs. Network: DeepEP's lowest published figure between
# nodes, 43 of 50 GB/s (EP16).
HOPPER_LINK_SHARE, BLACKWELL_LINK_SHARE, NETWORK_SHARE = 0.765, 0.71, 0.86
# 10^12 numbers a second that stock PyTorch writes where tensors are strided or broadcast; instructions bind it, not
# memory. Benchmarks of Liger-Kernel (benchmark/data): silu(gate) * up of the halves of one tensor on an H100, 8192 rows
# of 1024 to 32768, 0.0578 to 1.4953 ms ("megatron_swiglu", provider "torch"). Rotary embedding of transformers, 1024
# tokens to 8192 and more, its kernels all taken as such: H100 0.32, A100 0.20, and B200 0.34 with 2.4 times the memory
# rate of the H100 ("rope", provider "huggingface"; H100: benchmark/rope_speed of the first release).
HOPPER_STRIDED = 0.36
AMPERE_STRIDED = HOPPER_STRIDED * 0.20 / 0.32
# SMs that whole collectives occupy: DeepEP's default of 20 (24 in the Blackwell figure above).
HOPPER_SMS, BLACKWELL_SMS = 20 / 132, 24 / 148
# cuDNN's attention and most products of cuBLAS on Hopper are one program a multiprocessor from beginning to end: a
# dispatch launched beside attention began when that had ended (bench/NOTES.md, traces of layers between two H200s).
# Taken for Blackwell too. Where kernels are many programs, those that end make room at once.
PERSISTENT, MANY_PROGRAMS = 1.0, 0.0
COUNTS = ("processors", "node")  # fields of a cluster that are whole numbers
SHARES = ("collective_share", "fused_share", "put_share")


@dataclass(frozen=True)
class Cluster:
    """What a plan needs to know of the machines.

    matmul, matmul_fp8: TFLOP/s of large products. memory: TB/s of a copy. capacity: GB. attention: how the attention's
    share of ``matmul`` compares with that of FlashAttention-3 and 4 on their GPUs. strided: 10^12 numbers a second that
    a kernel writes whose tensors are strided or broadcast. processors: SMs (compute units) of a GPU.
    node: GPUs that reach each other by load and store. link, network: GB/s a direction inside a node and between
    nodes, as all-to-all kernels reach it. reduce: GB/s of bus bandwidth of an all-reduce inside a node.
    latency: ms from the launch of a collective to its end, beyond its bytes. reduce_latency: the same of a small
    all-reduce inside a node. collective_share, fused_share, put_share: share of the SMs that communication occupies: as
    whole collectives, fused inside a node, fused between nodes.
    late: share of a kernel of attention or of a dense product for which a transfer launched just before it waits.
    """

    name: str
    matmul: float
    matmul_fp8: float
    memory: float
    capacity: float
    link: float
    network: float
    reduce: float
    collective_share: float
    fused_share: float = COMMUNICATION.share
    put_share: float = COMMUNICATION.put_share
    attention: float = 1.0
    strided: float = HOPPER_STRIDED
    processors: int = 132
    node: int = 8
    # DeepEP's low-latency dispatch of 7.5 MB: 77 us at EP8, of which 47 us are bytes at 160 GB/s; 173 us at EP64, of
    # which 150 us are bytes at 50 GB/s.
    latency: float = 0.03
    # All-reduce of 512 bytes over 8 H100: 5.9 us (SGLang #2904); of 24 kB over 8 MI355X: 6.3 us (vLLM #39080).
    reduce_latency: float = 0.006
    late: float = PERSISTENT


def _hopper(name: str, memory: float, capacity: float, network: float) -> Cluster:
    """H100 and H200 SXM: NVLink 4, 450 GB/s a direction; float8 at twice the rate; a network card for each GPU.

    All-reduce without NVLink SHARP: the links' peak times what DeepEP reaches of it.
    """
    return Cluster(
        name, H100_MATMUL, 2 * H100_MATMUL, memory, capacity, 450 * HOPPER_LINK_SHARE, network * NETWORK_SHARE,
        450 * HOPPER_LINK_SHARE, HOPPER_SMS,
    )  # fmt: skip


def _cdna3(name: str, matmul: float, matmul_fp8: float, memory: float, capacity: float) -> Cluster:
    """MI300X and MI325X: AMD's max-achievable FLOPs (ROCm blog, "Measuring Max-Achievable FLOPs - Part 2").

    Links: ROCm blog on RCCL and xGMI, TransferBench all-to-all 316 GB/s with 8 of 304 compute units for each of 7
    peers, RCCL 310 to 330. Network: one 400 Gb/s card for each GPU. Memory: datasheet times an H100's share. The same
    low latencies as on Hopper are assumed, for attention the same share of the product rate, and the same rate of
    strided tensors.
    """
    return Cluster(
        name, matmul, matmul_fp8, memory * COPY_SHARE, capacity, 316, 50 * NETWORK_SHARE, 320, 56 / 304,
        processors=304, late=MANY_PROGRAMS,
    )  # fmt: skip


CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        _hopper("h100-ib400", H100_COPY, 80, 50),
        _hopper("h100-ib200", H100_COPY, 80, 25),
        # H200: 4.8 TB/s, 141 GB, otherwise an H100.
        _hopper("h200-ib400", 4.8 * COPY_SHARE, 141, 50),
        _hopper("h200-ib200", 4.8 * COPY_SHARE, 141, 25),
        # HGX B200: 2250 dense bfloat16 TFLOP/s, 8 TB/s, 180 GB, NVLink 5 with 900 GB/s a direction.
        Cluster(
            "b200-ib400", 2250 * MATMUL_SHARE, 4500 * MATMUL_SHARE, 8 * COPY_SHARE, 180, 900 * BLACKWELL_LINK_SHARE,
            50 * NETWORK_SHARE, 900 * BLACKWELL_LINK_SHARE, BLACKWELL_SMS, 8 / 148, processors=148,
        ),
        # GB200 NVL72: 180 dense bfloat16 PFLOP/s and 13.4 TB of memory for 72 GPUs, all in one NVLink domain.
        Cluster(
            "gb200-nvl72", 2500 * MATMUL_SHARE, 5000 * MATMUL_SHARE, 8 * COPY_SHARE, 186, 900 * BLACKWELL_LINK_SHARE,
            50 * NETWORK_SHARE, 900 * BLACKWELL_LINK_SHARE, BLACKWELL_SMS, 8 / 148, processors=148, node=72,
        ),
        # MI300X: 5.3 TB/s, 192 GB; MI325X: 6 TB/s, 256 GB.
        _cdna3("mi300x-400", 708, 1273, 5.3, 192),
        _cdna3("mi325x-400", 843, 1519, 6.0, 256),
        # A100 SXM: 312 TFLOP/s, 2.04 TB/s, NVLink 3 with 300 GB/s a direction, 108 SMs, 200 Gb/s; no float8 units.
        Cluster(
            "a100-ib200", 312 * MATMUL_SHARE, 312 * MATMUL_SHARE, 2.04 * COPY_SHARE, 80, 300 * HOPPER_LINK_SHARE,
            25 * NETWORK_SHARE, 300 * HOPPER_LINK_SHARE, 20 / 108, 8 / 108, strided=AMPERE_STRIDED, processors=108,
            late=MANY_PROGRAMS,
        ),
    )
}  # fmt: skip


def find_cluster(name: str | Path | Cluster) -> Cluster:
    """A named cluster, or that of a YAML file; a ``Cluster`` is returned as it is.

    The file holds fields of ``Cluster``; those that it leaves out come from the named cluster under ``like``.
    Raises UsageError for an unknown name or field, which lists the known ones, and for rates that are not positive.
    """
    if isinstance(name, Cluster):
        return name
    if str(name) in CLUSTERS:
        return CLUSTERS[str(name)]
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"Unknown cluster {str(name)!r}; use {', '.join(CLUSTERS)}, or the path of a YAML file.")
    return _from_yaml(path)


def _from_yaml(path: Path) -> Cluster:
    if find_spec("yaml") is None:
        raise UsageError("A cluster from a file needs PyYAML; run: pip install 'farskip-fused[demo]'.")
    import yaml

    try:
        given: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(given, dict):
        raise UsageError(f"{path} holds no mapping of rates such as 'link: 340'.")
    base = given.pop("like", None)
    if base is not None and base not in CLUSTERS:
        raise UsageError(f"{path}: like {base!r} is unknown; use {', '.join(CLUSTERS)}.")
    known = [field.name for field in fields(Cluster)]
    values = {"name": path.stem, **given} if base is None else {**asdict(CLUSTERS[base]), "name": path.stem, **given}
    unknown, required = set(given) - set(known), {"matmul", "matmul_fp8", "memory", "capacity", "link", "network"}
    missing = (required | {"reduce", "collective_share"}) - set(values)
    if unknown or missing:
        wrong = f"unknown {', '.join(sorted(map(str, unknown)))}" if unknown else f"no {', '.join(sorted(missing))}"
        raise UsageError(f"{path}: {wrong}; a cluster has {', '.join(known)}, or 'like' and what differs.")
    for key, value in values.items():
        least = 0 if key in ("latency", "reduce_latency", "late") or key in SHARES else 1e-9
        least = 1 if key in COUNTS else least
        most = 0.9 if key in SHARES else 1 if key == "late" else 1e9
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key != "name" and not (number and least <= value <= most):
            raise UsageError(f"{path}: {key} is {value!r}; a number from {least:g} to {most:g} is needed.")
    counts = {key: int(values[key]) for key in COUNTS if key in values}
    return Cluster(**{**values, **counts, "name": str(values["name"])})


def without(cluster: Cluster, share: float) -> Cluster:
    """What is left to computation when communication occupies that share of the SMs."""
    processors = max(1, round(cluster.processors * (1 - share)))
    left = processors / cluster.processors
    return replace(
        cluster, matmul=cluster.matmul * left, matmul_fp8=cluster.matmul_fp8 * left, strided=cluster.strided * left,
        processors=processors,
    )  # fmt: skip


def scaled(cluster: Cluster, *, compute: float = 1.0, links: float = 1.0) -> Cluster:
    """The cluster with other rates of computation and memory, and of everything that connects GPUs."""
    return replace(
        cluster,
        matmul=cluster.matmul * compute, matmul_fp8=cluster.matmul_fp8 * compute, memory=cluster.memory * compute,
        strided=cluster.strided * compute,
        link=cluster.link * links, network=cluster.network * links, reduce=cluster.reduce * links,
        latency=cluster.latency / links, reduce_latency=cluster.reduce_latency / links,
    )  # fmt: skip
