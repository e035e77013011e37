"""A small stack of overlapped layers for the tests, the same on every rank."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import farskip_fused as ff
from farskip_fused.connectivity import NAMES, Connectivity, Streams
from farskip_fused.layer import OverlappedLayer
from tests.numerics import DEVICE

HIDDEN, TOKENS = 32, 12
CONNECTIVITIES = {
    **{name: Connectivity.named(name) for name in NAMES},
    **{f"farskip, depth {depth}": Connectivity.farskip(depth) for depth in (2, 3)},
}


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


class SharedExperts(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(HIDDEN, 16), nn.SiLU(), nn.Linear(16, HIDDEN))


def make_stack(
    connectivities, with_shared, memory=None, device=DEVICE, *, depth=None, exchange=None, attention=Attention,
    shared_experts=SharedExperts,
):  # fmt: skip
    """A layer for each connectivity. depth: of the slots; by default enough for activation checkpointing."""
    torch.manual_seed(0)
    if memory is not None:
        memory.tells_libraries = False  # linear layers give the same bits with and without communication beside them
    layers = nn.ModuleList()
    depth = depth or max(2, *(2 * each.depth for each in connectivities))
    for connectivity in connectivities:
        # All experts are drawn on every rank, so that every rank has the same ones.
        whole = ff.FusedMoE(HIDDEN, 24, 4, 2, max_tokens=TOKENS, device=device)
        moe = ff.FusedMoE(HIDDEN, 24, 4, 2, max_tokens=TOKENS, ep=memory, depth=depth, exchange=exchange, device=device)
        rank, world = (0, 1) if memory is None else (memory.rank, memory.world)
        with torch.no_grad():
            moe.gate.weight.copy_(whole.gate.weight * 20)
            for name in ("w13", "w2"):
                getattr(moe, name).copy_(getattr(whole, name).chunk(world)[rank] * 10)
        moe.setup()
        layers.append(
            OverlappedLayer(
                attention(), moe, attention_norm=nn.RMSNorm(HIDDEN), moe_norm=nn.RMSNorm(HIDDEN),
                shared_experts=shared_experts() if with_shared else None, connectivity=connectivity,
            )
        )  # fmt: skip
    return layers.to(device)


def deepest(layers):
    return max(layer.connectivity.depth for layer in layers)


def run_reference(layers, embedding):
    streams = Streams.before_layers(embedding, deepest(layers))
    for layer in layers:
        streams = layer.reference(streams)
    return streams.full


def run_schedule(layers, embedding):
    carry = ff.Carry(embedding, deepest(layers))
    for layer in layers:
        carry = layer(carry)
    return carry.full()


def run_checkpointed(layers, embedding):
    carry = ff.Carry(embedding, deepest(layers))
    for layer in layers:
        carry = checkpoint(layer, carry, use_reentrant=False)
    return carry.full()


def outcome(run, layers, embedding, gradient):
    """By name: the output, the gradient of the embedding, and those of all parameters."""
    layers.zero_grad()
    inputs = embedding.clone().requires_grad_()
    result = run(layers, inputs)
    result.backward(gradient)
    gradients = {name: parameter.grad.clone() for name, parameter in layers.named_parameters()}
    return {"output": result.detach(), "embedding": inputs.grad, **gradients}


def assert_equal(found, expected):
    """Bit for bit."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"these differ: {different}"


def random_problem(device=DEVICE, tokens=TOKENS):
    return torch.randn(2, tokens, HIDDEN, device=device).unbind()
