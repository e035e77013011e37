"""What is asked of a plan: model, cluster, split and work. Impossible splits are refused with the numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from farskip_fused.connectivity import MOST_DEPTH, NAMES
from farskip_fused.errors import UsageError
from farskip_fused.plan.clusters import Cluster, find_cluster
from farskip_fused.plan.models import Model, find_model
from farskip_fused.plan.routing import Routing, sample
from farskip_fused.schedule import TENSOR_PARALLEL_CONNECTIVITIES

PHASES = ("training", "prefill", "decode")
PRECISIONS = ("bf16", "fp8")
TRANSPORTS = {
    "streams": "whole collectives on a side stream, a row sent once for each rank that needs it (as DeepEP does)",
    "all-to-all": "whole collectives on a side stream, a row sent once for each expert (NCCL's, RCCL's all-to-all)",
    "fused": "communication issued by the expert kernels, in blocks of rows; as designed, not yet as measured",
}
ELEMENTWISE = {
    "separate": "norms, rotary embedding, activations and additions one by one, as PyTorch runs stock modules",
    "fused": "each group of them in one pass, as Megatron with TransformerEngine and vLLM",
}
# vLLM's default for gpu_memory_utilization; the rest is context, fragmentation and communication buffers.
USABLE_MEMORY = 0.9
# Of a parameter, float32, sharded over all GPUs (ZeRO-2): gradient, weight and two moments. The bfloat16 weights stay.
SHARDED_BYTES = 16


@dataclass(frozen=True)
class Job:
    """One question to the plan. ``Job(...)`` raises UsageError for unknown names and impossible splits.

    model, cluster: a name, a path or the object. ep, tp: expert- and tensor-parallel ranks; dp: replicas of the
        attention, as many as make tp dp cover ep by default. GPUs: tp dp.
    sequence: tokens of a sequence; of its context in decode. batch: sequences of a replica at a time.
    connectivity, depth: what to compare with standard. transport: a key of ``TRANSPORTS``.
    elementwise: a key of ``ELEMENTWISE``; by default separate in training, where converted models are modules of
        transformers, and fused in prefill and decode, where vLLM runs them.
    skew: exponent of a Zipf law over experts; 0 is uniform. layers: cut the model to its first layers.
    micro_batches: forward and backward passes of an optimizer step.

    In prefill and decode, tp > 1 with dp = 1 means tensor-parallel inference: every rank has all tokens and partial
    sums are all-reduced. Everything else exchanges rows, and tp splits tokens outside the attention.
    """

    model: str | Path | Model
    cluster: str | Path | Cluster = "h100-ib400"
    ep: int = 8
    tp: int = 1
    dp: int | None = None
    sequence: int = 4096
    batch: int = 1
    phase: str = "training"
    precision: str = "bf16"
    connectivity: str = "farskip"
    depth: int = 1
    transport: str = "streams"
    elementwise: str | None = None
    skew: float = 0.0
    layers: int | None = None
    micro_batches: int = 1

    def __post_init__(self) -> None:
        if self.elementwise is None:
            object.__setattr__(self, "elementwise", "separate" if self.phase == "training" else "fused")
        for what, known in (
            ("phase", PHASES), ("precision", PRECISIONS), ("transport", tuple(TRANSPORTS)), ("connectivity", NAMES),
            ("elementwise", tuple(ELEMENTWISE)),
        ):  # fmt: skip
            if getattr(self, what) not in known:
                raise UsageError(f"Unknown {what} {getattr(self, what)!r}; use {', '.join(known)}.")
        object.__setattr__(self, "cluster", find_cluster(self.cluster))
        object.__setattr__(self, "model", self._cut(find_model(self.model)))
        for what in ("ep", "tp", "dp", "sequence", "batch", "micro_batches", "depth"):
            value = getattr(self, what)
            if what == "dp" and value is None:
                value = -(-self.ep // self.tp)
                object.__setattr__(self, "dp", value)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"{what} is {value!r}; a whole number from 1 is needed.")
        if not 0 <= self.skew <= 3:
            raise UsageError(f"skew is {self.skew!r}; an exponent from 0 (uniform) to 3 is needed.")
        self._check_order()
        self._check_split()
        self._check_memory()

    def _cut(self, model: Model) -> Model:
        if self.layers is None:
            return model
        if not 1 <= self.layers <= model.layers:
            raise UsageError(f"{self.layers} layers were asked for; {model.name} has {model.layers}.")
        moe = self.layers - (model.layers - model.moe_layers)
        if moe < 1:
            raise UsageError(f"The first {self.layers} layers of {model.name} are dense; ask for more.")
        return replace(model, layers=self.layers, moe_layers=moe)

    @property
    def sizes(self) -> Model:
        """The model, found and cut."""
        assert isinstance(self.model, Model)
        return self.model

    @property
    def machines(self) -> Cluster:
        """The cluster, found."""
        assert isinstance(self.cluster, Cluster)
        return self.cluster

    @property
    def replicas(self) -> int:
        assert self.dp is not None
        return self.dp

    @property
    def gpus(self) -> int:
        return self.tp * self.replicas

    @property
    def fp8(self) -> bool:
        return self.precision == "fp8"

    @property
    def reduces(self) -> bool:
        """Whether partial sums are all-reduced (tensor-parallel inference) instead of rows exchanged."""
        return self.phase != "training" and self.tp > 1 and self.replicas == 1

    @property
    def replica_tokens(self) -> int:
        """Tokens that one replica of the attention sees at a time."""
        return self.batch if self.phase == "decode" else self.batch * self.sequence

    @property
    def tokens(self) -> int:
        """Tokens of one rank outside the attention."""
        return self.replica_tokens if self.reduces else -(-self.replica_tokens // self.tp)

    @cached_property
    def routing(self) -> Routing:
        model = self.sizes
        tokens = max(1, self.tokens // self.ep) if self.reduces else self.tokens
        limits = (model.groups, model.groups_of_token)
        return sample(model.experts, model.top_k, *limits, self.skew, self.ep, self.machines.node, tokens)

    @property
    def in_one_node(self) -> bool:
        """Whether all ranks that exchange tokens reach each other by load and store."""
        return self.ep <= self.machines.node

    def _check_order(self) -> None:
        if self.depth > MOST_DEPTH:
            raise UsageError(f"depth is {self.depth}; 1 to {MOST_DEPTH} can be planned.")
        if self.depth > 1 and (self.connectivity != "farskip" or self.reduces):
            raise UsageError(f"depth {self.depth} is for connectivity farskip with rows exchanged; use depth 1.")
        if self.reduces and self.connectivity not in TENSOR_PARALLEL_CONNECTIVITIES:
            known = " or ".join(TENSOR_PARALLEL_CONNECTIVITIES)
            raise UsageError(f"Tensor-parallel inference has no order for {self.connectivity}; use {known}.")

    def _check_split(self) -> None:
        model, ep, tp = self.sizes, self.ep, self.tp
        if model.heads % tp:
            raise UsageError(f"{model.heads} attention heads of {model.name} do not divide over TP {tp}.")
        if not model.latent_rank and model.key_value_heads % tp and tp % model.key_value_heads:
            raise UsageError(f"{model.key_value_heads} key-value heads of {model.name} do not divide over TP {tp}.")
        if model.experts % ep:
            raise UsageError(f"{model.experts} experts of {model.name} do not divide over EP {ep}.")
        if self.gpus % ep:
            raise UsageError(f"EP {ep} does not divide the {self.gpus} GPUs of TP {tp} x DP {self.dp}.")
        if self.reduces and (model.intermediate % (tp // ep) or model.shared % tp):
            raise UsageError(
                f"Experts of size {model.intermediate} (shared {model.shared}) of {model.name} do not divide over"
                f" TP {tp} with EP {ep}."
            )

    def weights_per_gpu(self) -> tuple[float, float]:
        """Parameters that one GPU holds: of routed experts, of everything else."""
        model = self.sizes
        experts = model.moe_layers * model.experts * model.expert()
        replicated = model.layers * model.replicated_attention()
        split = model.total() - experts - replicated
        return experts / (self.tp if self.reduces else self.ep), split / self.tp + replicated

    def cache_per_gpu(self) -> float:
        """GB of the key-value cache: bfloat16, its heads split over TP as far as there are heads."""
        model = self.sizes
        parts = 1 if model.latent_rank else min(self.tp, model.key_value_heads)
        return self.batch * self.sequence * model.layers * model.cached() * 2 / parts / 1e9

    def activations(self) -> tuple[float, float]:
        """GB that a training step keeps for the backward pass: everything, and only what every layer starts from.

        The experts keep their input rows and pre-activations (2 H + 4 K I bytes a token, bench/NOTES.md).
        """
        model = self.sizes
        starts = 2 * 2 * model.hidden  # the two streams
        attention = 2 * (2 * model.heads * (model.query_head + model.value_head) + model.cached())
        experts = 2 * model.hidden * (1 + self.routing.remote_ranks) + 4 * model.top_k * model.intermediate
        everything = starts + attention + experts + 4 * model.shared + 2 * 2 * model.hidden  # two norms' outputs
        logits = 4 * model.vocabulary * self.tokens / 1e9
        return (
            everything * self.tokens * model.layers / 1e9 + logits,
            (starts * model.layers + everything) * self.tokens / 1e9 + logits,
        )

    def memory(self) -> dict[str, float]:
        """GB of one GPU: weights, gradients and optimizer or key-value cache, and activations."""
        experts, rest = self.weights_per_gpu()
        if self.phase != "training":
            return {"weights": (experts + rest) * (1 if self.fp8 else 2) / 1e9, "cache": self.cache_per_gpu()}
        kept, starts = self.activations()
        states = ((experts + rest) * 2 + SHARDED_BYTES * self.sizes.total() / self.gpus) / 1e9
        fits = states + kept <= self.machines.capacity * USABLE_MEMORY
        return {"weights, gradients, optimizer": states, "activations": kept if fits else starts}

    @cached_property
    def recomputes(self) -> bool:
        """Whether a training step must run forward passes again, since not everything fits that they leave behind."""
        return self.phase == "training" and self.memory()["activations"] < self.activations()[0]

    def _check_memory(self) -> None:
        parts, usable = self.memory(), self.machines.capacity * USABLE_MEMORY
        if sum(parts.values()) > usable:
            listed = ", ".join(f"{name} {size:.0f} GB" for name, size in parts.items())
            raise UsageError(
                f"{self.sizes.name} does not fit: a GPU of {self.machines.name} has {usable:.0f} GB to use of"
                f" {self.machines.capacity:.0f}, {self.phase} with EP {self.ep}, TP {self.tp}, DP {self.dp} needs"
                f" {sum(parts.values()):.0f} ({listed}); use more GPUs, a larger EP or TP, or a smaller batch."
            )
