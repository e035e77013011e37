"""How long each action and transfer of a layer takes, by its name in ``schedule.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from farskip_fused.plan.job import Job
from farskip_fused.plan.kernels import Machine

# Blocks of rows in which the fused transport announces arrivals. Eight times as many change a layer by 2 % at most.
FUSED_PIECES = 8
FP8_ROW = 1 + 4 / 128  # bytes of a number on its way: float8 and a float32 scale for every 128 (DeepEP)
OPTIMIZER_TRAFFIC = 30  # bytes of a parameter in an AdamW step: gradient, moments and weights read, all but it written


@dataclass(frozen=True)
class Durations:
    """Milliseconds of actions and of transfers on the link.

    contention: share of the SMs that a transfer in flight takes from computation.
    pieces: blocks in which transfers and the experts' work follow each other; 1 for whole collectives.
    early_combine: whether blocks of results leave as they are finished, or all after the last.
    own: share of the experts' rows that are there without a transfer.
    """

    actions: dict[str, float]
    transfers: dict[str, float]
    contention: float = 0.0
    pieces: int = 1
    early_combine: bool = False
    own: float = 0.0


class _Layer:
    """Durations of one MoE layer of a job. times: 1 forward; 2 backward, where every product becomes two and gradients
    are read and written beside what is read again."""

    def __init__(self, job: Job) -> None:
        self.job, self.model, self.machine = job, job.sizes, Machine(job.machines, job.fp8)
        self.rows = 2 * self.model.hidden  # bytes of a token's hidden state

    def projections(self, times: int) -> float:
        job, model = self.job, self.model
        seen, heads = job.replica_tokens, model.heads / job.tp
        key_values = max(1.0, model.key_value_heads / job.tp)
        norm = self.machine.memory(times * job.tokens * 2 * self.rows, times)
        if model.latent_rank:
            into = self.machine.matmul(seen, model.hidden, model.query_rank + model.latent_rank + model.rope_head)
            queries = self.machine.matmul(seen, model.query_rank or model.hidden, heads * model.query_head)
            keys_values = heads * (model.query_head - model.rope_head + model.value_head)
            products = into + queries + self.machine.matmul(seen, model.latent_rank, keys_values)
            rotated = heads * model.query_head + model.rope_head
        else:
            width = heads * model.query_head + key_values * (model.query_head + model.value_head)
            products = self.machine.matmul(seen, model.hidden, width)
            rotated = (heads + key_values) * model.query_head
        rotation = self.machine.memory(times * seen * rotated * 2 * 2, times)
        return norm + times * products + rotation + self.tensor_parallel()

    def core(self, times: int) -> float:
        job, model = self.job, self.model
        seen, heads = job.replica_tokens, model.heads / job.tp
        output = times * self.machine.matmul(seen, heads * model.value_head, model.hidden)
        added = self.machine.memory(times * job.tokens * 3 * self.rows, times)
        return self.scores(times > 1) + output + added + self.tensor_parallel()

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

    def gate(self, times: int) -> float:
        """Norm, gate, top-k, and with the plain all-to-all a copy of each row for each of its experts."""
        job, model = self.job, self.model
        copies = (1 + model.top_k) * self.rows if job.transport == "all-to-all" and not job.reduces else 0
        product = times * self.machine.matmul(job.tokens, model.hidden, model.experts)
        traffic = job.tokens * (2 * self.rows + 8 * model.experts + copies)
        return product + self.machine.memory(times * traffic, 3 * times)

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

    def mlp(self, size: float, tokens: int, times: int) -> float:
        """A dense SwiGLU MLP, such as the shared experts."""
        if not size:
            return 0.0
        hidden, memory = self.model.hidden, self.machine.memory(times * tokens * 3 * size * 2, times)
        up = self.machine.matmul(tokens, hidden, 2 * size)
        return times * (up + self.machine.matmul(tokens, size, hidden)) + memory

    def shared(self, times: int) -> float:
        return self.mlp(self.model.shared / (self.job.tp if self.job.reduces else 1), self.job.tokens, times)


def forward_durations(job: Job, *, early_combine: bool = False) -> Durations:
    """Of one MoE layer's forward pass on the busiest rank. early_combine: of the fused transport, see ``Durations``."""
    layer = _Layer(job)
    attention = {"attention_projections": layer.projections(1), "attention_core": layer.core(1)}
    rest = {"experts": layer.experts(False), "shared_experts": layer.shared(1)}
    if job.reduces:
        reduce = reduction(job)
        transfers = {"attention_reduce": reduce, "expert_reduce": reduce}
        share = job.machines.fused_share if job.transport == "fused" else job.machines.collective_share
        return Durations({**attention, "gate": layer.gate(1), **rest}, transfers, share)
    actions = {
        **attention, "finish_combine": layer.finish_combine(_row_an_expert(job, early_combine)),
        "start_dispatch": layer.gate(1), **rest,
    }  # fmt: skip
    transfers = {
        "dispatch": exchange(job, job.fp8, job.transport == "all-to-all"),
        "combine": exchange(job, False, _row_an_expert(job, early_combine)),
    }
    return Durations(actions, transfers, **_transport(job, early_combine))


def backward_durations(job: Job, *, early_combine: bool = False) -> Durations:
    """Of one MoE layer's backward pass. The experts' input and weight gradients take half of their time each."""
    layer = _Layer(job)
    half = layer.experts(True) / 2
    actions = {
        "attention_projections_backward": layer.projections(2),
        "attention_core_backward": layer.core(2),
        "start_combine_gradients": layer.finish_combine(job.transport == "all-to-all"),
        "finish_dispatch_gradients": layer.gate(2),
        "experts_input_gradients": half,
        "experts_weight_gradients": half,
        "shared_experts_backward": layer.shared(2),
    }
    transfers = {
        "combine_gradients": exchange(job, False, job.transport == "all-to-all"),
        "dispatch_gradients": exchange(job, False, _row_an_expert(job, early_combine)),
    }
    return Durations(actions, transfers, **_transport(job, early_combine))


def _row_an_expert(job: Job, early_combine: bool) -> bool:
    """Whether results come back as a row for each expert: with the plain all-to-all, and tile by tile as finished."""
    return job.transport == "all-to-all" or (job.transport == "fused" and early_combine)


def _transport(job: Job, early_combine: bool) -> dict[str, Any]:
    if job.transport != "fused":
        return {"contention": job.machines.collective_share}
    return {
        "contention": job.machines.fused_share, "pieces": FUSED_PIECES, "early_combine": early_combine,
        "own": 1 / job.ep,
    }  # fmt: skip


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
    size = model.dense_intermediate / (job.tp if job.reduces else 1)
    dense = 0.0
    for times in (1, 2) if training else (1,):
        again = 2 if times == 1 and job.recomputes else 1
        dense += again * (layer.projections(times) + layer.core(times) + layer.mlp(size, job.tokens, times))
        dense += 0.0 if not job.reduces else 2 * reduction(job)
    predicted = job.tokens if training else job.batch
    vocabulary = model.vocabulary / (job.tp if job.reduces else 1)
    head = (3 if training else 1) * Machine(job.machines).matmul(predicted, model.hidden, vocabulary)
    if not training:
        return dense * (model.layers - model.moe_layers) + head
    # The loss reads logits and writes their gradients, in float32.
    loss = machine.memory(job.tokens * vocabulary * (4 + 4 + 2))
    optimizer = machine.memory(OPTIMIZER_TRAFFIC * model.total() / job.gpus) / job.micro_batches
    return dense * (model.layers - model.moe_layers) + head + loss + optimizer
