"""Ours, and the expert layers that it is measured against: how each is made or found, called and checked.

All take routed tokens: hidden_states [T, H], index [T, K] int32, weights [T, K] float32, w13 [E, 2I, H] (gate rows,
then up rows), w2 [E, H, I], and return [T, H]. What they leave out (the router) nobody is timed with.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farskip_fused.bench.grouped_mm import grouped_mm_experts
from farskip_fused.bench.shapes import Shape, random_routing
from farskip_fused.errors import UsageError
from farskip_fused.moe import FusedExperts

Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
LARGEST_ERROR = 2e-2
PEERS = ("grouped_mm", "vllm", "sonicmoe")
# SonicMoE's own requirements would take torch back to 2.9.
INSTALL = {
    "vllm": "pip install vllm",
    "sonicmoe": "pip install --no-deps sonic-moe==0.1.2.post1 quack-kernels==0.3.11 nvidia-cutlass-dsl==4.4.2 "
    "nvidia-cutlass-dsl-libs-base==4.4.2 apache-tvm-ffi==0.1.11 cuda-bindings cuda-pathfinder",
}


@dataclass(frozen=True)
class Problem:
    """Inputs of one layer; all but ``index`` and ``output_gradient`` [T, H] have a gradient."""

    hidden_states: Tensor
    index: Tensor
    weights: Tensor
    w13: Tensor
    w2: Tensor
    output_gradient: Tensor

    @staticmethod
    def random(shape: Shape, tokens: int, w13: Tensor, w2: Tensor, skew: float = 0.0) -> Problem:
        index, weights = random_routing(shape, tokens, w13.device, skew)
        hidden_states, output_gradient = (
            torch.randn(tokens, shape.hidden, device=w13.device, dtype=w13.dtype) for _ in range(2)
        )
        return Problem(hidden_states.requires_grad_(), index, weights.requires_grad_(), w13, w2, output_gradient)

    def forward(self, layer: Layer, w13: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return layer(self.hidden_states, self.index, self.weights, self.w13 if w13 is None else w13, self.w2)

    def gradients(self, layer: Layer, w13: Tensor | None = None) -> tuple[Tensor, ...]:
        """Of hidden states, weights, w13 and w2."""
        inputs = (self.hidden_states, self.weights, self.w13 if w13 is None else w13, self.w2)
        output = layer(inputs[0], self.index, *inputs[1:])
        return torch.autograd.grad(output, inputs, self.output_gradient)


@dataclass(frozen=True)
class Peer:
    """A layer; ``interleaved`` if it wants the rows of w13 as gate 0, up 0, gate 1, up 1, ..."""

    run: Layer
    trains: bool = True
    interleaved: bool = False

    def arrange(self, w13: Tensor) -> Tensor:
        """w13 [E, 2I, H] with its rows as this peer wants them: itself or a copy."""
        if not self.interleaved:
            return w13
        return w13.detach().unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).contiguous()


def make_experts(shape: Shape, tokens: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> FusedExperts:
    layer = FusedExperts(
        shape.hidden, shape.intermediate, shape.experts, shape.top_k, max_tokens=tokens, device=device, dtype=dtype
    )
    layer.setup()
    return layer


def as_peer(experts: FusedExperts) -> Peer:
    """Ours, called like a peer; its weights are its own."""
    return Peer(lambda hidden_states, index, weights, w13, w2: experts(hidden_states, index, weights))


def _vllm() -> Peer:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    def run(hidden_states: Tensor, index: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        return fused_experts(hidden_states, w13, w2, weights, index)

    return Peer(run, trains=False)


def _sonicmoe() -> Peer:
    """What sonicmoe.moe_TC_softmax_topk_layer does after its router."""
    from sonicmoe import functional
    from sonicmoe.enums import ActivationType

    def run(hidden_states: Tensor, index: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        tokens, top_k = index.shape
        num_experts, entries = w13.shape[0], index.numel()
        sizes = (num_experts, num_experts + 1, entries, entries, entries)
        frequency, offsets, gather, scatter, reverse = (index.new_empty(size) for size in sizes)
        functional.TC_topk_router_metadata_triton(index, num_experts, frequency, offsets, gather, scatter, reverse)
        activated, gate_up = functional._UpProjection.apply(
            hidden_states, w13.permute(1, 2, 0), None, offsets, entries, top_k, gather, scatter, reverse, None, False,
            ActivationType.SWIGLU, not torch.is_grad_enabled(), False,
        )  # fmt: skip
        return functional._DownProjection.apply(
            activated, gate_up, w2.permute(1, 2, 0), None, weights, offsets, tokens, top_k, gather, scatter, reverse,
            None, False, ActivationType.SWIGLU,
        )  # fmt: skip

    return Peer(run, interleaved=True)


def available(names: Sequence[str]) -> tuple[dict[str, Peer], dict[str, str]]:
    """The named peers that are installed, and why the others are not there."""
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise UsageError(f"Unknown peer {unknown[0]!r}; use {', '.join(PEERS)}.")
    found = {"grouped_mm": Peer(grouped_mm_experts)} if "grouped_mm" in names else {}
    missing = {}
    for name, distribution, find in (("vllm", "vllm", _vllm), ("sonicmoe", "sonic-moe", _sonicmoe)):
        if name not in names:
            continue
        try:
            version = importlib.metadata.version(distribution)
            found[name] = find()
        except importlib.metadata.PackageNotFoundError:
            missing[name] = f"not installed; {INSTALL[name]}"
        except Exception as error:  # another project's import: anything may come
            missing[name] = f"the import of {distribution} {version} failed: {error!r}"
    return found, missing


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    value, reference = value.detach().float(), reference.detach().float()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))


def check(name: str, peer: Peer, ours: Peer, problem: Problem, backward: bool) -> float:
    """Largest relative error between the peer's numbers and ours; RuntimeError if it is not small.

    Compared are the output or the gradients, those of the weights for the first, middle and last expert.
    """
    w13 = peer.arrange(problem.w13)
    if not backward:
        errors = [relative_error(problem.forward(peer.run, w13), problem.forward(ours.run))]
    else:
        num_experts = problem.w13.shape[0]
        sample = sorted({0, num_experts // 2, num_experts - 1})

        def sampled(gradients: tuple[Tensor, ...], arrange: Callable[[Tensor], Tensor]) -> list[Tensor]:
            return [gradients[0], gradients[1], arrange(gradients[2][sample]), gradients[3][sample]]

        expected = sampled(problem.gradients(ours.run), peer.arrange)  # all gradients of both may not fit into memory
        given = sampled(problem.gradients(peer.run, w13.requires_grad_()), lambda gradient: gradient)
        errors = [relative_error(*pair) for pair in zip(given, expected, strict=True)]
    if not max(errors) < LARGEST_ERROR:
        raise RuntimeError(f"{name} and ours differ: relative errors {', '.join(f'{one:.3g}' for one in errors)}.")
    return max(errors)
