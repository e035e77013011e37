"""The scheduled layer computes the plain definition of the streams: outputs bit for bit, gradients to rounding."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import farskip_fused as ff
from farskip_fused.connectivity import NAMES, Streams, advance
from farskip_fused.launch import run_ranks
from farskip_fused.layer import OverlappedLayer
from farskip_fused.schedule import ACTIONS, forward_order
from tests.numerics import DEVICE, assert_close
from tests.rungs import RUNGS

HIDDEN, LAYERS, TOKENS = 32, 3, 12


class Attention(nn.Module):
    """Single-head causal attention in two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def project(self, hidden_states):
        return self.qkv(hidden_states).chunk(3, dim=-1)

    def attend(self, projected):
        query, key, value = (part[None, None] for part in projected)
        return self.out(nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)[0, 0])


def make_stack(connectivity, with_shared, memory=None, device=DEVICE):
    torch.manual_seed(0)
    layers = nn.ModuleList()
    for _ in range(LAYERS):
        # All experts are drawn on every rank, so that every rank has the same ones.
        whole = ff.FusedMoE(HIDDEN, 24, 4, 2, max_tokens=TOKENS, device=device)
        moe = ff.FusedMoE(HIDDEN, 24, 4, 2, max_tokens=TOKENS, ep=memory, device=device)
        rank, world = (0, 1) if memory is None else (memory.rank, memory.world)
        with torch.no_grad():
            moe.gate.weight.copy_(whole.gate.weight * 20)
            for name in ("w13", "w2"):
                getattr(moe, name).copy_(getattr(whole, name).chunk(world)[rank] * 10)
        moe.setup()
        shared = nn.Sequential(nn.Linear(HIDDEN, 16), nn.SiLU(), nn.Linear(16, HIDDEN)) if with_shared else None
        layers.append(
            OverlappedLayer(
                Attention(), moe, attention_norm=nn.RMSNorm(HIDDEN), moe_norm=nn.RMSNorm(HIDDEN),
                shared_experts=shared, connectivity=connectivity,
            )
        )  # fmt: skip
    return layers.to(device)


def run_definition(layers, embedding):
    streams = Streams(embedding, embedding)
    for layer in layers:

        def mlp(stream, layer=layer):
            normed = layer.moe_norm(stream)
            return None if layer.shared_experts is None else layer.shared_experts(normed), layer.moe(normed)

        def attention(stream, layer=layer):
            return layer.attention.attend(layer.attention.project(layer.attention_norm(stream)))

        streams = advance(streams, layer.connectivity, attention, mlp)
    return streams.full


def run_schedule(layers, embedding):
    carry = embedding
    for layer in layers:
        carry = layer(carry)
    return carry.full()


def compare(layers, embedding, gradient):
    outcomes = []
    for run in (run_definition, run_schedule):
        layers.zero_grad()
        inputs = embedding.clone().requires_grad_()
        result = run(layers, inputs)
        result.backward(gradient)
        outcomes.append([result, inputs.grad, *(parameter.grad.clone() for parameter in layers.parameters())])
    (plain, *plain_gradients), (scheduled, *scheduled_gradients) = outcomes
    assert torch.equal(plain, scheduled)
    # Autograd adds the gradients of a stream's readers in the order in which they ran, which the schedule changes.
    for gradient, expected in zip(scheduled_gradients, plain_gradients, strict=True):
        assert_close(gradient, expected, torch.float32)


@pytest.mark.parametrize("with_shared", [False, True], ids=["no shared experts", "shared experts"])
@pytest.mark.parametrize("connectivity", NAMES)
def test_schedule_equals_definition(monkeypatch, connectivity, with_shared):
    monkeypatch.setattr(ff.FusedExperts, "is_alone", False)  # through the slots, as on several ranks
    layers = make_stack(connectivity, with_shared, ff.init(device=DEVICE))
    compare(layers, torch.randn(TOKENS, HIDDEN, device=DEVICE), torch.randn(TOKENS, HIDDEN, device=DEVICE))


def test_schedule_equals_definition_on_a_rank_without_slots():
    layers = make_stack("farskip", True)
    compare(layers, torch.randn(TOKENS, HIDDEN, device=DEVICE), torch.randn(TOKENS, HIDDEN, device=DEVICE))


@pytest.mark.parametrize("in_slots", [False, True], ids=["one rank", "slots"])
def test_checkpointed_layers_give_the_same_gradients_step_after_step(monkeypatch, in_slots):
    monkeypatch.setattr(ff.FusedExperts, "is_alone", not in_slots)
    memory = ff.init(device=DEVICE)
    layers = make_stack("farskip", False, memory)
    for _ in range(3):
        embedding, gradient = torch.randn(2, TOKENS, HIDDEN, device=DEVICE)
        outcomes = []
        for run in (run_schedule, run_checkpointed):
            layers.zero_grad()
            inputs = embedding.clone().requires_grad_()
            run(layers, inputs).backward(gradient)
            outcomes.append([inputs.grad, *(parameter.grad.clone() for parameter in layers.parameters())])
        for plain, again in zip(*outcomes, strict=True):
            assert_close(again, plain, torch.float32)
    assert len(memory.buffers) == in_slots and not any(slots.open_rounds for slots in memory.buffers.values())


def run_checkpointed(layers, embedding):
    carry = embedding
    for layer in layers:
        carry = checkpoint(layer, carry, use_reentrant=False)
    return carry.full()


def compare_on_rank(memory):
    layers = make_stack("farskip", True, memory, memory.device)
    torch.manual_seed(memory.rank + 1)
    embedding, gradient = (torch.randn(TOKENS - memory.rank, HIDDEN, device=memory.device) for _ in range(2))
    compare(layers, embedding, gradient)


@pytest.mark.parametrize("device", RUNGS)
def test_schedule_equals_definition_on_two_ranks(device):
    run_ranks(compare_on_rank, 2, device=device)


@pytest.mark.parametrize("connectivity", NAMES)
def test_every_order_holds_every_action_once(connectivity):
    order = forward_order(ff.Connectivity.named(connectivity))
    assert sorted(action.name for action in order) == sorted(action.name for action in ACTIONS)


def test_attention_in_one_piece_is_refused():
    moe = ff.FusedMoE(HIDDEN, 24, 4, 2, max_tokens=4)
    with pytest.raises(TypeError, match=r"no method project\(\)"):
        OverlappedLayer(nn.Identity(), moe, attention_norm=nn.Identity(), moe_norm=nn.Identity())
