"""Backward really runs in the order of ``schedule.backward_order``: recorded, not derived."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import farskip_fused as ff
from farskip_fused import expert_parallel
from farskip_fused.kernels import experts_backward
from farskip_fused.launch import run_ranks
from farskip_fused.schedule import backward_order
from tests.layer_stack import (
    CONNECTIVITIES,
    Attention,
    SharedExperts,
    make_stack,
    outcome,
    random_problem,
    run_checkpointed,
    run_schedule,
)
from tests.numerics import DEVICE, assert_close

FARSKIP, DEEP = CONNECTIVITIES["farskip"], CONNECTIVITIES["farskip, depth 2"]


class Mark(torch.autograd.Function):
    """Writes down when a gradient passes."""

    @staticmethod
    def forward(ctx, tensor, log, entry):
        ctx.log, ctx.entry = log, entry
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        ctx.log.append(ctx.entry)
        return gradient, None, None


class Recorder:
    """Of each action of backward: (its name, the layer, "begin" or "end"); transfers and experts only begin."""

    def __init__(self, monkeypatch):
        self.log, self.flights = [], []
        recorder, attentions, shared = self, itertools.count(), itertools.count()

        class MarkedAttention(Attention):
            def __init__(self):
                super().__init__()
                self.layer = next(attentions)

            def mark(self, tensor, action, end):
                return Mark.apply(tensor, recorder.log, (f"attention_{action}_backward", self.layer, end))

            def project(self, hidden_states):
                return self.mark(self.qkv(self.mark(hidden_states, "projections", "end")), "projections", "begin")

            def attend(self, projected):
                parts = self.mark(projected, "core", "end").chunk(3, dim=-1)
                return self.mark(super().attend(parts), "core", "begin")

        class MarkedSharedExperts(SharedExperts):
            def __init__(self):
                super().__init__()
                self.layer = next(shared)

            def forward(self, hidden_states):
                inputs = Mark.apply(hidden_states, recorder.log, ("shared_experts_backward", self.layer, "end"))
                outputs = super().forward(inputs)
                return Mark.apply(outputs, recorder.log, ("shared_experts_backward", self.layer, "begin"))

        self.parts = {"attention": MarkedAttention, "shared_experts": MarkedSharedExperts}
        for function, action in (
            (expert_parallel.Combine, "start_combine_gradients"),
            (expert_parallel._Experts, "experts_input_gradients"),
            (expert_parallel.Dispatch, "finish_dispatch_gradients"),
        ):
            monkeypatch.setattr(function, "backward", self.recorded(function.backward, action))
        weight_gradient = experts_backward.weight_gradient

        def recorded_weight_gradient(*arguments):
            entry = ("experts_weight_gradients", self.layer, "begin")
            if entry not in self.log:  # the first of two products
                self.log.append(entry)
            return weight_gradient(*arguments)

        monkeypatch.setattr(experts_backward, "weight_gradient", recorded_weight_gradient)
        start = ff.FusedMoE.start

        def recorded_start(moe, *arguments, **options):
            pending = start(moe, *arguments, **options)
            self.flights.append(pending._flight)
            return pending

        monkeypatch.setattr(ff.FusedMoE, "start", recorded_start)

    def recorded(self, backward, action):
        def run(ctx, gradient):
            self.layer = self.flights.index(ctx.flight)
            self.log.append((action, self.layer, "begin"))
            return backward(ctx, gradient)

        return staticmethod(run)


class Model(nn.Module):
    def __init__(self, layers, run):
        super().__init__()
        self.layers, self.run = layers, run

    def forward(self, embedding):
        return self.run(self.layers, embedding)


HAVE_ENDS = {"attention_projections_backward", "attention_core_backward", "shared_experts_backward"}


def scheduled(connectivity, layers):
    """What the schedule says of a stack: first the combines behind which nothing comes, then turn by turn."""
    order = backward_order(connectivity)
    last_turn = layers - 1 + max(-action.layer for action in order)
    expected = [("start_combine_gradients", layers - 1 - index, "begin") for index in range(connectivity.depth)]
    for turn in range(last_turn, -1, -1):
        for action in order:
            of = turn + action.layer
            if not 0 <= of < layers:
                continue
            if action.name == "start_combine_gradients":
                of += action.launches[1]
                expected += [(action.name, of, "begin")] if of >= 0 else []
                continue
            expected += [(action.name, of, "begin")]
            expected += [(action.name, of, "end")] if action.name in HAVE_ENDS else []
    return expected


def check_order(monkeypatch, connectivity, run, memory, prepare=Model):
    recorder = Recorder(monkeypatch)
    layers = make_stack([connectivity] * (connectivity.depth + 1), True, memory, memory.device, **recorder.parts)
    model = prepare(layers, run)
    embedding, gradient = random_problem(memory.device)
    model(embedding.requires_grad_()).backward(gradient)
    assert recorder.log == scheduled(connectivity, len(layers))
    return model


@pytest.mark.parametrize("connectivity", CONNECTIVITIES.values(), ids=CONNECTIVITIES)
def test_backward_runs_as_scheduled(monkeypatch, connectivity):
    monkeypatch.setattr(ff.FusedExperts, "is_alone", False)
    check_order(monkeypatch, connectivity, run_schedule, ff.init(device=DEVICE))


@pytest.mark.full
@pytest.mark.parametrize("connectivity", CONNECTIVITIES.values(), ids=CONNECTIVITIES)
def test_backward_runs_as_scheduled_when_activations_are_recomputed(monkeypatch, connectivity):
    monkeypatch.setattr(ff.FusedExperts, "is_alone", False)
    check_order(monkeypatch, connectivity, run_checkpointed, ff.init(device=DEVICE))


def sharded(layers, run):
    """FSDP2 on all but the experts."""
    for layer in layers:
        fully_shard(layer.attention)
        for method in ("project", "attend"):
            register_fsdp_forward_method(layer.attention, method)
        fully_shard(layer.shared_experts)
    experts = {weight for layer in layers for weight in (layer.moe.w13, layer.moe.w2)}
    return fully_shard(Model(layers, run), ignored_params=experts)


def run_sharded(memory):
    embedding, gradient = random_problem(memory.device)
    for connectivity, run in ((FARSKIP, run_schedule), (FARSKIP, run_checkpointed), (DEEP, run_schedule)):
        with pytest.MonkeyPatch.context() as monkeypatch:
            model = check_order(monkeypatch, connectivity, run, memory, sharded)
        plain = make_stack([connectivity] * len(model.layers), True, memory, memory.device)
        expected = outcome(run_schedule, plain, embedding, gradient)
        model.zero_grad()
        model(embedding).backward(gradient)
        for name, parameter in model.layers.named_parameters():
            found, reference = parameter.grad, expected[name]
            if isinstance(found, DTensor):
                dist.all_reduce(reference)
                found, reference = found.full_tensor(), reference / memory.world
            assert_close(found, reference, torch.float32)
    (layer,) = make_stack([FARSKIP], True, memory, memory.device)
    fully_shard(layer, ignored_params={layer.moe.w13, layer.moe.w2})
    with pytest.raises(ff.UsageError, match="given to fully_shard as a whole"):
        layer(embedding)


@pytest.mark.full
@pytest.mark.rung2
def test_dense_parts_sharded_by_fsdp2_keep_order_and_gradients():
    run_ranks(run_sharded, 2, limit=600)
