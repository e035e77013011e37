"""Tensor-parallel layers compute the plain definition of the streams, whole sub-layers on one rank, up to rounding."""

from functools import partial

import pytest
import torch
from torch import nn

import farskip_fused as ff
from farskip_fused import reference
from farskip_fused.connectivity import Streams, advance
from farskip_fused.launch import run_ranks
from farskip_fused.schedule import ATTENTION_CORE, ATTENTION_PROJECTIONS, GATE, SHARED_EXPERTS, tensor_parallel_order
from farskip_fused.symmetric.local import LocalMemory
from farskip_fused.tensor_parallel import SplitMLP, SplitMoE, TensorParallelLayer
from tests.capture import capture
from tests.numerics import DEVICE, assert_close
from tests.rungs import GPU_RUNGS, RUNGS

HIDDEN, HEADS, SIZE, TOKENS = 32, 4, 8, 11
EXPERTS, TOP_K, INTERMEDIATE = 8, 3, 24
# Of each layer: its connectivity, "dense " before it where it has no experts.
STACKS = (
    ("dense farskip", "farskip", "farskip"),
    ("standard", "standard", "farskip"),
    ("dense standard", "farskip"),
    ("dense farskip", "standard"),
)


class Heads(nn.Module):
    """Causal attention of a rank's share of the heads."""

    def __init__(self, memory):
        super().__init__()
        self.local = HEADS // memory.world
        self.qkv = nn.Linear(HIDDEN, 3 * self.local * SIZE, bias=False, device=memory.device)
        self.out = nn.Linear(self.local * SIZE, HIDDEN, bias=False, device=memory.device)

    def project(self, hidden_states):
        return self.qkv(hidden_states).view(-1, 3, self.local, SIZE).permute(1, 2, 0, 3)

    def attend(self, projected):
        attended = nn.functional.scaled_dot_product_attention(*projected[:, None], is_causal=True)[0]
        return self.out(attended.transpose(0, 1).flatten(1))


def make_sub_layers(memory, dense, with_shared):
    attention, moe, shared = Heads(memory), None, None
    if not dense:
        moe = SplitMoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, memory=memory, normalize_top_k=True)
    if dense or with_shared:
        shared = SplitMLP(HIDDEN, 2 * INTERMEDIATE, memory=memory)
    norms = [nn.RMSNorm(HIDDEN, device=memory.device) for _ in range(2)]
    return nn.ModuleDict({"attention": attention, "moe": moe, "shared": shared, "norm": norms[0], "moe_norm": norms[1]})


def share(name, whole, memory):
    """A rank's part of a parameter of a whole sub-layer."""
    rank, world = memory.rank, memory.world
    if "w13" in name or name.endswith("w2"):
        return whole.chunk(world)[rank]
    if "qkv" in name or "gate_up" in name:  # each of several parts is split
        return whole.unflatten(0, (3 if "qkv" in name else 2, -1)).chunk(world, dim=1)[rank].flatten(0, 1)
    if "out" in name or "down" in name:
        return whole.chunk(world, dim=1)[rank]
    return whole


def make_stacks(memory, stack, with_shared):
    """The whole sub-layers of each layer, and layers of this rank's share of them, overlapped and blocking."""
    torch.manual_seed(0)
    alone = LocalMemory(memory.device, 60.0)
    all_reduce = ff.AllReduce(memory, max_tokens=TOKENS, hidden_size=HIDDEN, one_shot_bytes=TOKENS // 2 * HIDDEN * 4)
    all_reduce.setup()
    whole, layers = [], {False: [], True: []}
    for index, text in enumerate(stack):
        dense, connectivity = text.startswith("dense"), text.split()[-1]
        parts = make_sub_layers(alone, dense, with_shared)
        for parameter in parts.parameters():
            nn.init.normal_(parameter, std=0.3)
        whole.append((parts, connectivity))
        mine = make_sub_layers(memory, dense, with_shared)
        with torch.no_grad():
            for (name, parameter), full in zip(mine.named_parameters(), parts.parameters(), strict=True):
                parameter.copy_(share(name, full, memory))
        for blocking, found in layers.items():
            found.append(
                TensorParallelLayer(
                    mine["attention"], mine["moe"], attention_norm=mine["norm"], moe_norm=mine["moe_norm"],
                    shared_experts=mine["shared"], all_reduce=all_reduce, connectivity=connectivity, blocking=blocking,
                    next_reads_partial=stack[index + 1 : index + 2] != () and stack[index + 1].endswith("farskip"),
                )
            )  # fmt: skip
    return whole, layers[False], layers[True]


def run_definition(whole, embedding):
    streams = Streams(embedding, embedding)
    for parts, connectivity in whole:

        def mlp(stream, parts=parts):
            normed = parts["moe_norm"](stream)
            shared = None if parts["shared"] is None else parts["shared"](normed)
            return shared, None if parts["moe"] is None else run_experts(parts["moe"], normed)

        def attention(stream, parts=parts):
            return parts["attention"].attend(parts["attention"].project(parts["norm"](stream)))

        streams = advance(streams, ff.Connectivity.named(connectivity), attention, mlp)
    return streams.full


def run_experts(moe, hidden_states):
    ids, weights = reference.route(hidden_states @ moe.gate.weight.T, TOP_K, sigmoid=False, normalise=True, scaling=1.0)
    return reference.experts(hidden_states, ids, weights, moe.w13, moe.w2)


def run_layers(layers, embedding):
    carry = embedding
    for layer in layers:
        carry = layer(carry)
    return carry.full()


@torch.no_grad()
def compare(memory, stacks, shared):
    for stack in stacks:
        for with_shared in shared:
            whole, layers, blocking = make_stacks(memory, stack, with_shared)
            generator = torch.Generator().manual_seed(1)
            for tokens in (TOKENS, 2) if memory.world > 1 else (TOKENS,):  # in two shots, and in one
                embedding = torch.randn(tokens, HIDDEN, generator=generator).to(memory.device)
                result = run_layers(layers, embedding)
                assert_close(result, run_definition(whole, embedding), torch.float32)
                if tokens == TOKENS:
                    assert torch.equal(result, run_layers(blocking, embedding))
                for other in memory.gather(result.cpu()):
                    assert torch.equal(result.cpu(), other)
    assert run_layers(layers, embedding[:0]).shape == (0, HIDDEN)
    memory.synchronize()


@pytest.mark.parametrize(("stack", "with_shared"), list(zip(STACKS, (True, True, False, True), strict=True)), ids=str)
def test_layers_of_one_rank_equal_the_definition(stack, with_shared):
    compare(ff.init(device=DEVICE), [stack], [with_shared])


@pytest.mark.parametrize("device", RUNGS)
def test_two_ranks_equal_the_definition_and_each_other_bit_for_bit_overlapped_or_not(device):
    stacks, shared = (STACKS[1:2], [True]) if device == "cpu" else (STACKS, [False, True])
    run_ranks(compare, 2, stacks, shared, device=device)


@pytest.mark.rung3
def test_four_ranks_equal_the_definition():
    run_ranks(compare, 4, STACKS, [True], device="cuda:0")


@torch.no_grad()
def replay(memory, replays):
    for stack in STACKS:
        _, layers, _ = make_stacks(memory, stack, True)
        embedding = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(memory.device)
        graph, found = capture(memory, partial(run_layers, layers, embedding))
        for seed in range(replays):
            drawn = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))
            embedding.copy_(drawn.to(memory.device))
            graph.replay()
            assert torch.equal(found, run_layers(layers, embedding))
        memory.synchronize()
        memory.barrier()


@pytest.mark.parametrize("device", GPU_RUNGS)
def test_a_captured_stack_is_replayed_on_changing_embeddings(device):
    run_ranks(replay, 2, 50, device=device)


def test_shared_experts_have_a_sum_of_their_own_only_before_a_layer_that_reads_the_partial_stream():
    farskip, standard = ff.Connectivity.farskip(), ff.Connectivity.standard()
    assert tensor_parallel_order(farskip, True) == tensor_parallel_order(farskip, False)
    launches = [
        [action.launches and action.launches[0] for action in tensor_parallel_order(standard, partial)]
        for partial in (False, True)
    ]
    assert launches[0] == [None, "attention_reduce", None, None, "expert_reduce"]
    assert launches[1] == [None, "attention_reduce", None, "attention_reduce", "expert_reduce"]
    names = [action.name for action in tensor_parallel_order(standard, True)]
    assert names == [each.name for each in (ATTENTION_PROJECTIONS, ATTENTION_CORE, GATE, SHARED_EXPERTS)] + ["experts"]


@torch.no_grad()
def test_a_stream_that_cannot_be_had_is_refused():
    memory = ff.init(device=DEVICE)
    _, (first, second, *_), _ = make_stacks(memory, STACKS[2], True)
    first.next_reads_partial = False
    carry = first(torch.zeros(3, HIDDEN, device=DEVICE))
    with pytest.raises(ff.UsageError, match="make that layer with next_reads_partial=True"):
        second(carry)
    carry.full()


class TestBadInput:
    @pytest.fixture
    def all_reduce(self):
        return ff.AllReduce(ff.init(device=DEVICE), max_tokens=4, hidden_size=HIDDEN)

    def test_other_connectivity_is_refused(self, all_reduce):
        with pytest.raises(ff.UsageError, match="one of farskip, standard"):
            TensorParallelLayer(
                Heads(all_reduce.memory), None, attention_norm=nn.Identity(), moe_norm=nn.Identity(),
                all_reduce=all_reduce, connectivity="moe_only",
            )  # fmt: skip

    def test_attention_in_one_piece_and_experts_without_a_start_are_refused(self, all_reduce):
        for attention, moe, missing in (
            (nn.Identity(), None, "project"),
            (Heads(all_reduce.memory), nn.Identity(), "start"),
        ):
            with pytest.raises(TypeError, match=rf"Identity has no method {missing}\(\)"):
                TensorParallelLayer(
                    attention, moe, attention_norm=nn.Identity(), moe_norm=nn.Identity(), all_reduce=all_reduce
                )

    def test_sizes_that_do_not_divide_are_refused(self, all_reduce):
        memory = all_reduce.memory
        memory.world = 3
        with pytest.raises(ff.UsageError, match="8 experts do not divide over 3 ranks"):
            SplitMoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, memory=memory)
        with pytest.raises(ff.UsageError, match="25 does not divide over 3 ranks"):
            SplitMLP(HIDDEN, 25, memory=memory)
