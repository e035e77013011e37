"""How long each action and transfer of a layer takes, by its name in ``schedule.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from farskip_fused.plan.clusters import without
from farskip_fused.plan.elementwise import elementwise
from farskip_fused.plan.job import Job
from farskip_fused.plan.kernels import Machine

# Blocks of rows in which the fused transport announces arrivals. Eight times as many change a layer by 2 % at most.
FUSED_PIECES = 8
FP8_ROW = 1 + 4 / 128  # bytes of a number on its way: float8 and a float32 scale for every 128 (DeepEP)
OPTIMIZER_TRAFFIC = 30  # bytes of a parameter in an AdamW step: gradient, moments and weights read, all but it written


@dataclass(frozen=True)
class Durations:
    """Milliseconds of actions and of transfers on the link.

    contention: share of computation's rate that a transfer in flight takes.
    held: of an action, how long its first kernel leaves no SM to a transfer that was launched before it.
    pieces: blocks in which transfers and the experts' work follow each other; 1 for whole collectives.
    early_combine: whether blocks of results leave as they are finished, or all after the last.
    own: share of the experts' rows that are there without a transfer.
    """

    actions: dict[str, float]
    transfers: dict[str, float]
    contention: float = 0.0
    held: dict[str, float] = field(default_factory=dict)
    pieces: int = 1
    early_combine: bool = False
    own: float = 0.0


class _Layer:
    """Durations of one MoE layer of a job, forward or backward."""

    def __init__(self, job: Job) -> None:
        self.job, self.model, self.machine = job, job.sizes, Machine(job.machines, job.fp8)
        self.elementwise = elementwise(job, self.machine)
        self.rows = 2 * self.model.hidden  # bytes of a token's hidden state

    def projections(self, backward: bool) -> float:
        job, model = self.job, self.model
        seen, heads = job.replica_tokens, model.heads / job.tp
        key_values = max(1.0, model.key_value_heads / job.tp)
        linear = partial(self.machine.linear, seen, backward=backward)
        if model.latent_rank:
            into = linear(model.hidden, model.query_rank + model.latent_rank + model.rope_head)
            queries = linear(model.query_rank or model.hidden, heads * model.query_head)
            keys_values = heads * (model.query_head - model.rope_head + model.value_head)
            products = into + queries + linear(model.latent_rank, keys_values)
        else:
            width = heads * model.query_head + key_values * (model.query_head + model.value_head)
            products = linear(model.hidden, width)
        return products + self.elementwise.projections(backward) + self.tensor_parallel()

    def core(self, backward: bool) -> float:
        job, model = self.job, self.model
        seen, heads = job.replica_tokens, model.heads / job.tp
        output = self.machine.linear(seen, heads * model.value_head, model.hidden, backward=backward)
        return self.scores(backward) + output + self.elementwise.core() + self.tensor_parallel()

    def scores(self, backward: bool) -> float:
        """The attention itself."""
        job, model = self.job, self.model
        length, heads = model.attended(job.sequence), model.heads / job.tp
        if job.phase == "decode":
            parts = 1 if model.latent_rank else min(job.tp, model.key_value_heads)
            cache = self.machine.memory(job.batch * length * model.cached() * 2 / parts)
            # Latent attention works on the latents themselves there.
            wide = model.latent_rank * 2 + model.rope_head if model.latent_rank else model.query_head + model.value_head
            return max(cache, 2 * job.batch * length * heads * wide / (job.machines.matmul * 1e9))
        flops = 2 * job.replica_tokens * length / 2 * heads * (model.query_head + model.value_head)
        return self.machine.attention(flops, length, backward=backward)

    def tensor_parallel(self) -> float:
        """All-gather before the attention, reduce-scatter after it, where rows are exchanged: not hidden."""
        job, cluster = self.job, self.job.machines
        if job.tp == 1 or job.reduces:
            return 0.0
        moved = job.replica_tokens * self.rows * (job.tp - 1) / job.tp
        rate = cluster.reduce if job.tp <= cluster.node else cluster.network
        return cluster.latency + moved / (rate * 1e6)

    def gate(self, backward: bool) -> float:
        """Norm, gate, top-k, and with the plain all-to-all a copy of each row for each of its experts."""
        job, model, times = self.job, self.model, 2 if backward else 1
        copies = (1 + model.top_k) * self.rows if job.transport == "all-to-all" and not job.reduces else 0
        traffic = job.tokens * (8 * model.experts + copies)
        return self.elementwise.gate(backward) + self.machine.memory(times * traffic, 2 * times)

    def finish_combine(self, row_an_expert: bool) -> float:
        """Rows come back and are added to the stream: one a token, or one for each of its experts."""
        rows = 2 + (self.model.top_k if row_an_expert else 1)
        return self.machine.memory(self.job.tokens * rows * self.rows)

    def experts(self, backward: bool) -> float:
        job, model, routing = self.job, self.model, self.job.routing
        rows = job.tokens * model.top_k * routing.busiest / (job.ep if job.reduces else 1)
        local = model.experts / job.ep
        active = local * (1 - (1 - min(1.0, 1 / local)) ** rows) if rows else 0.0
        intermediate = model.intermediate * (job.ep / job.tp if job.reduces else 1)
        # Rows that arrive for each expert are sorted by expert once more.
        sort = self.machine.memory(rows * 2 * self.rows) if job.transport == "all-to-all" and not job.reduces else 0.0
        return self.machine.experts(rows, model.hidden, intermediate, active, backward=backward) + sort

    def mlp(self, size: float, tokens: int, backward: bool) -> float:
        """A dense SwiGLU MLP, such as the shared experts."""
        if not size:
            return 0.0
        hidden, activation = self.model.hidden, self.elementwise.activation(size, tokens, backward)
        up, down = (
            self.machine.linear(tokens, *sizes, backward=backward) for sizes in ((hidden, 2 * size), (size, hidden))
        )
        return up + down + activation

    def shared(self, backward: bool) -> float:
        return self.mlp(self._shared_size(), self.job.tokens, backward)

    def first_shared(self) -> float:
        """The first product of the shared experts."""
        return self.machine.matmul(self.job.tokens, self.model.hidden, 2 * self._shared_size())

    def _shared_size(self) -> float:
        return self.model.shared / (self.job.tp if self.job.reduces else 1)


def forward_durations(job: Job, *, early_combine: bool = False) -> Durations:
    """Of one MoE layer's forward pass on the busiest rank. early_combine: of the fused transport, see ``Durations``."""
    if job.reduces:
        reduce = reduction(job)
        return _durations(job, _forward, {"attention_reduce": reduce, "expert_reduce": reduce}, early_combine)
    transfers = {
        "dispatch": exchange(job, job.fp8, job.transport == "all-to-all"),
        "combine": exchange(job, False, _row_an_expert(job, early_combine)),
    }
    return _durations(job, _forward, transfers, early_combine)


def backward_durations(job: Job, *, early_combine: bool = False) -> Durations:
    """Of one MoE layer's backward pass. The experts' input and weight gradients take half of their time each."""
    transfers = {
        "combine_gradients": exchange(job, False, job.transport == "all-to-all"),
        "dispatch_gradients": exchange(job, False, _row_an_expert(job, early_combine)),
    }
    return _durations(job, _backward, transfers, early_combine)


def _forward(job: Job, early_combine: bool) -> dict[str, float]:
    layer = _Layer(job)
    attention = {"attention_projections": layer.projections(False), "attention_core": layer.core(False)}
    rest = {"experts": layer.experts(False), "shared_experts": layer.shared(False)}
    if job.reduces:
        return {**attention, "gate": layer.gate(False), **rest}
    return {
        **attention, "finish_combine": layer.finish_combine(_row_an_expert(job, early_combine)),
        "start_dispatch": layer.gate(False), **rest,
    }  # fmt: skip


def _backward(job: Job, early_combine: bool) -> dict[str, float]:
    layer = _Layer(job)
    half = layer.experts(True) / 2
    return {
        "attention_projections_backward": layer.projections(True),
        "attention_core_backward": layer.core(True),
        "start_combine_gradients": layer.finish_combine(job.transport == "all-to-all"),
        "finish_dispatch_gradients": layer.gate(True),
        "experts_input_gradients": half,
        "experts_weight_gradients": half,
        "shared_experts_backward": layer.shared(True),
    }


def _durations(
    job: Job, actions_of: Callable[[Job, bool], dict[str, float]], transfers: dict[str, float], early_combine: bool
) -> Durations:
    """With what transfers and computation take from each other."""
    cluster, layer, actions = job.machines, _Layer(job), actions_of(job, early_combine)
    fused = job.transport == "fused"
    share = cluster.collective_share
    if fused:
        share = cluster.fused_share if job.in_one_node else cluster.put_share
    beside = actions_of(replace(job, cluster=without(cluster, share)), early_combine)
    # Backward, transfers are launched before kernels of many programs, but for standard connectivity's gradients of the
    # routed output, whose delay is left out. Results that leave early are sent by the experts' own kernels.
    held = {"attention_core": cluster.late * layer.scores(False)}
    if not early_combine:
        held["shared_experts"] = cluster.late * layer.first_shared()
    durations = Durations(actions, transfers, 1 - sum(actions.values()) / sum(beside.values()), held)
    if not fused or job.reduces:
        return durations
    return replace(durations, pieces=FUSED_PIECES, early_combine=early_combine, own=1 / job.ep)


def _row_an_expert(job: Job, early_combine: bool) -> bool:
    """Whether results come back as a row for each expert: with the plain all-to-all, and tile by tile as finished."""
    return job.transport == "all-to-all" or (job.transport == "fused" and early_combine)


def exchange(job: Job, fp8: bool, row_an_expert: bool) -> float:
    """ms of a dispatch or combine: the slower of what crosses the network and what stays in the node, side by side.

    row_an_expert: a row goes once for each expert; otherwise once for each rank, over the network once for each node,
    which forwards it inside.
    """
    routing, cluster = job.routing, job.machines
    if job.ep == 1:
        return 0.0
    if row_an_expert:
        network, link = routing.remote_rows, routing.near_rows
    else:
        network, link = routing.remote_nodes, routing.near_ranks + routing.forwarded
    row = job.tokens * job.sizes.hidden * (FP8_ROW if fp8 else 2) * routing.busiest
    return cluster.latency + max(network * row / (cluster.network * 1e6), link * row / (cluster.link * 1e6))


def reduction(job: Job) -> float:
    """ms of an all-reduce of a batch's hidden states: reduce-scatter and all-gather in the node, and, where there are
    several, an all-reduce of each GPU's part between them."""
    cluster, moved = job.machines, job.replica_tokens * job.sizes.hidden * 2
    near, nodes = min(job.tp, cluster.node), -(-job.tp // cluster.node)
    inside = 2 * (near - 1) / near * moved / (cluster.reduce * 1e6)
    between = cluster.latency + 2 * (nodes - 1) / nodes * moved / near / (cluster.network * 1e6) if nodes > 1 else 0.0
    return cluster.reduce_latency + inside + between


def outside_moe_layers(job: Job) -> float:
    """ms of a step outside the MoE layers: dense layers, output head, optimizer."""
    layer, model, machine = _Layer(job), job.sizes, Machine(job.machines, job.fp8)
    training = job.phase == "training"
    passes = (False, True) if training else (False,)
    size = model.dense_intermediate / (job.tp if job.reduces else 1)
    dense = 0.0
    for backward in passes:
        again = 2 if not backward and job.recomputes else 1
        dense += again * (layer.projections(backward) + layer.core(backward) + layer.mlp(size, job.tokens, backward))
        dense += 0.0 if not job.reduces else 2 * reduction(job)
    predicted = job.tokens if training else job.batch
    vocabulary = model.vocabulary / (job.tp if job.reduces else 1)
    head = sum(
        Machine(job.machines).linear(predicted, model.hidden, vocabulary, backward=backward) for backward in passes
    )
    if not training:
        return dense * (model.layers - model.moe_layers) + head
    # The loss reads logits and writes their gradients, in float32.
    loss = machine.memory(job.tokens * vocabulary * (4 + 4 + 2))
    optimizer = machine.memory(OPTIMIZER_TRAFFIC * model.total() / job.gpus) / job.micro_batches
    return dense * (model.layers - model.moe_layers) + head + loss + optimizer
