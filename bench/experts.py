"""`farskip bench experts`: the expert layer on one GPU, ours against its peers and against dense matrix products.

``dense`` is the limit: cuBLAS products of the same FLOPs, all rows times one expert's matrices. All other layers do
everything after routing, from ids and weights of the top-k experts to the weighted sum, and are timed in one rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from farskip_fused.bench import decode as decode_room
from farskip_fused.bench import gemms as gemms_room
from farskip_fused.bench import timing
from farskip_fused.bench.peers import Peer, Problem, as_peer, available, check, make_experts
from farskip_fused.bench.report import environment
from farskip_fused.bench.shapes import BYTES, PRODUCTS, ZIPF, Shape, parse_shape
from farskip_fused.errors import UsageError
from farskip_fused.moe import FusedExperts

TOKENS = (4096, 16384)
DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OURS_UNIFORM = "ours, uniform"


def run(
    shapes: Sequence[str],
    tokens: Sequence[int],
    peers: Sequence[str],
    *,
    skewed: bool = False,
    decode: bool = False,
    gemms: bool = False,
) -> dict[str, Any]:
    """Measure named or numbered shapes at each number of tokens; bfloat16.

    peers: names from ``peers.PEERS``. skewed: Zipf routing instead of uniform, and ours also with uniform.
    decode, gemms: small sizes in CUDA graphs, or our kernels one by one, instead of whole layers.
    Returns environment, ceilings, missing (what was left out, and why), and the rows of layers, decode and gemms.
    Raises UsageError for an unknown shape or peer, for decode with gemms, and without a GPU.
    """
    parsed = {name: parse_shape(name) for name in shapes}
    found, missing = available(peers)
    if decode and gemms:
        raise UsageError("--decode and --gemms were both given; measure one at a time.")
    if not torch.cuda.is_available():
        raise UsageError("farskip bench experts measures a CUDA GPU and this machine has none.")
    report: dict[str, Any] = {
        "environment": environment(), "missing": missing, "ceilings": timing.ceilings(),
        "layers": [], "decode": [], "gemms": [],
    }  # fmt: skip
    with Console(stderr=True).status("") as status:
        for name, shape in parsed.items():
            status.update(f"{name}, up to {max(tokens)} tokens")
            with leaving_out(missing, name):
                if decode:
                    report["decode"] += decode_room.measure(name, shape, tokens, found)
                elif gemms:
                    report["gemms"] += gemms_room.measure(name, shape, tokens, skewed)
                else:
                    report["layers"] += measure(name, shape, tokens, found, missing, skewed)
    return report


@contextmanager
def leaving_out(missing: dict[str, str], what: str) -> Iterator[None]:
    """Running out of memory inside is noted, and what the allocator has cached is given back."""
    try:
        yield
    except torch.OutOfMemoryError:
        missing[what] = "it does not fit into the GPU's memory"
    finally:
        torch.cuda.empty_cache()


def measure(
    name: str,
    shape: Shape,
    token_counts: Sequence[int],
    peers: Mapping[str, Peer],
    missing: dict[str, str],
    skewed: bool = False,
) -> list[dict[str, Any]]:
    """One row for each number of tokens, forward and with backward; a direction that does not fit is empty."""
    experts = make_experts(shape, max(token_counts))
    rows = []
    for tokens in token_counts:
        problem = Problem.random(shape, tokens, experts.w13, experts.w2, ZIPF if skewed else 0.0)
        row: dict[str, Any] = {
            "shape": name, **shape._asdict(), "tokens": tokens, "routing": f"Zipf {ZIPF:g}" if skewed else "uniform",
            "saved_bytes": saved_bytes(shape, problem, as_peer(experts)), "errors": {}, "zipf_over_uniform": {},
        }  # fmt: skip
        for direction in PRODUCTS:
            row[direction] = {}
            with leaving_out(missing, f"{name}, T {tokens}, {direction}"):
                row[direction] = time_layers(row, shape, problem, direction, experts, peers, skewed)
        rows.append(row)
    return rows


def time_layers(
    row: dict[str, Any],
    shape: Shape,
    problem: Problem,
    direction: str,
    experts: FusedExperts,
    peers: Mapping[str, Peer],
    skewed: bool,
) -> dict[str, dict[str, float]]:
    """ms, spread_ms and TFLOP/s of each layer, after the numbers of every peer were checked against ours.

    The largest errors, and ours under Zipf over ours under uniform routing, are noted in ``row``.
    """
    ours, backward = as_peer(experts), direction == "forward_backward"
    peers = {name: peer for name, peer in peers.items() if peer.trains or not backward}
    row["errors"][direction] = {name: check(name, peer, ours, problem, backward) for name, peer in peers.items()}
    torch.cuda.empty_cache()  # a peer that wants another order of rows was checked on a copy of the weights
    # Which rows of w13 are gate and which are up makes no difference to the time.
    calls = {"dense": dense(problem, backward)}
    for name, peer in {"ours": ours, **peers}.items():
        calls[name] = timed(problem, peer, backward)
    if skewed:
        uniform = Problem.random(shape, problem.index.shape[0], experts.w13, experts.w2)
        calls[OURS_UNIFORM] = timed(uniform, ours, backward)
    times = timing.interleave(calls)
    if skewed:
        row["zipf_over_uniform"][direction] = times["ours"].ms / times.pop(OURS_UNIFORM).ms
    flops = shape.flops(row["tokens"], direction)
    return {
        name: {"ms": time.ms, "spread_ms": time.spread_ms, "tflops": flops / time.ms * 1e-9}
        for name, time in times.items()
    }


def timed(problem: Problem, layer: Peer, backward: bool) -> timing.Call:
    return lambda: problem.gradients(layer.run) if backward else problem.forward(layer.run)


def dense(problem: Problem, backward: bool) -> Callable[[], Any]:
    rows = problem.index.numel()
    up, down = problem.w13[0].detach(), problem.w2[0].detach()
    inputs, activated = (up.new_empty(rows, size).normal_() for size in (down.shape[0], down.shape[1]))

    def forward() -> Tensor:
        torch.mm(activated, down.T)
        return torch.mm(inputs, up.T)

    if not backward:
        return forward
    gate_up = forward()

    def both() -> None:
        forward()
        # Gradients of the activation, of the input, of w13 and of w2; the input stands in for the output's gradient.
        torch.mm(inputs, down), torch.mm(gate_up, up), torch.mm(gate_up.T, inputs), torch.mm(inputs.T, activated)

    return both


def saved_bytes(shape: Shape, problem: Problem, layer: Peer) -> dict[str, Any]:
    """What a forward pass keeps for backward, without the weights.

    measured: what autograd was given, each storage once, and of it ``indices``, whatever is no 16-bit value.
    held: what the allocator counts as in use after forward beyond the output, and the input, which was there before;
    None without a GPU. formula: 2 T H + 4 T K I.
    """
    storages: dict[int, tuple[int, bool]] = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in (problem.w13, problem.w2)}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor.dtype == problem.w13.dtype)
        return tensor

    on_gpu = problem.hidden_states.is_cuda
    before = torch.cuda.memory_allocated() if on_gpu else 0
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = layer.run(problem.hidden_states, problem.index, problem.weights, problem.w13, problem.w2)
    tokens, hidden = output.shape
    held = None
    if on_gpu:
        held = torch.cuda.memory_allocated() - before - output.untyped_storage().nbytes() + tokens * hidden * BYTES
    return {
        "measured": sum(size for size, _ in storages.values()),
        "indices": sum(size for size, is_value in storages.values() if not is_value),
        "held": held, "formula": shape.saved_bytes(tokens),
    }  # fmt: skip
