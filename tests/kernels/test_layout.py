"""Positions, the expert-sorted order and its tiles, against the counting sort of the extension and plain torch."""

import numpy as np
import pytest
import torch

from farskip_fused import _C
from farskip_fused.kernels import layout, protocol
from farskip_fused.symmetric.local import LocalMemory
from farskip_fused.symmetric.slots import SlotShape, open_slots
from tests.numerics import DEVICE

TILE_ROWS = 16


@pytest.fixture
def context():
    memory = LocalMemory(torch.device(DEVICE), 5.0)
    yield open_slots(memory, SlotShape(max_tokens=16, hidden_size=16, top_k=3, dtype=torch.float32)).context
    memory.close()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever a kernel leaves unwritten must not happen to be right."""

    def filled(*shape, **options):
        return torch.full(shape[0] if len(shape) == 1 else shape, -77, **options)

    monkeypatch.setattr(layout.torch, "empty", filled)


def random_experts(tokens, num_experts, top_k):
    experts = torch.rand(tokens, num_experts).argsort(dim=-1)[:, :top_k].to(torch.int32)
    return torch.where(torch.rand(experts.shape) < 0.2, -1, experts)


def check(found, experts, num_experts, valid=None):
    """The layout of ids ``experts`` [R, K] on the CPU, of which those outside [0, E) and not ``valid`` do not count."""
    flat = experts.flatten().long()
    routed = (flat >= 0) & (flat < num_experts)
    if valid is not None:
        routed &= valid[:, None].expand_as(experts).flatten()
    order = torch.where(routed, flat, num_experts).argsort(stable=True)[: int(routed.sum())]
    offsets = torch.bincount(flat[routed], minlength=num_experts).cumsum(0)
    offsets = torch.cat([offsets.new_zeros(1), offsets])
    out_of_range = (flat < -1) | (flat >= num_experts)
    places = torch.where(out_of_range, -2, -1).index_put((order,), torch.arange(len(order)))
    tiles = []
    for expert in range(num_experts):
        start, end = int(offsets[expert]), int(offsets[expert + 1])
        first = len(tiles)
        tiles += [[expert, first, start, end]] * -(-(end - start) // TILE_ROWS)
    assert found.tile_rows == TILE_ROWS
    assert torch.equal(found.offsets.cpu().long(), offsets)
    assert torch.equal(found.order.cpu()[: len(order)].long(), order)
    assert (found.order.cpu()[len(order) :] == -77).all()
    assert torch.equal(found.places.cpu().flatten().long(), places)
    assert found.tile_count.tolist() == [len(tiles)]
    assert found.tiles.cpu()[: len(tiles)].tolist() == tiles


def received_layout(context, experts, num_experts):
    """Sort local ids [R, K] as a receiver does, from counts that it has taken on the way."""
    capacity = experts.shape[0] * min(experts.shape[1], num_experts)
    block_entries = layout.block_entries_of(experts.numel())
    blocks = experts.flatten().split(block_entries) or [experts.flatten()]
    counts = [torch.bincount(block[block >= 0], minlength=num_experts) for block in blocks]
    block_counts = torch.stack(counts).to(DEVICE, torch.int32)
    return layout.sort_received(context, experts.to(DEVICE), block_counts, block_entries, capacity, TILE_ROWS)


@pytest.mark.parametrize("tokens", [0, 1, 37, 1500])
def test_received_entries_are_sorted_as_the_extension_sorts_them(context, tokens):
    experts = random_experts(tokens, 8, 3)
    found = received_layout(context, experts, 8)
    check(found, experts, 8)
    counts, order = _C.layout(experts.numpy(), 8)
    assert np.array_equal(found.offsets.diff().cpu().numpy(), counts)
    assert np.array_equal(found.order.cpu().numpy()[: len(order)], order)


def test_more_entries_than_the_capacity_fail_the_context_and_route_nothing(context):
    experts = torch.zeros(600, 3, dtype=torch.int32)  # three times the one expert there is
    found = received_layout(context, experts, 1)
    check(found, torch.full_like(experts, -1), 1)
    assert int(context[protocol.FAILED.value]) == 1


# The sizes at which one program is enough, at which there are several, and at which these take more than one chunk.
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k"),
    [(0, 4, 2), (1, 1, 1), (30, 8, 3), (255, 60, 8), (257, 64, 8), (1000, 5, 3), (17000, 256, 8)],
)
def test_own_entries_are_sorted_by_expert_then_token_then_position(tokens, num_experts, top_k):
    experts = random_experts(tokens, num_experts, top_k)
    check(layout.local_layout(experts.to(DEVICE), num_experts, TILE_ROWS), experts, num_experts)


@pytest.mark.parametrize("tokens", [100, 900])
@pytest.mark.parametrize("case", ["one expert", "none", "repeated", "out of range"])
def test_any_ids_are_ordinary_input(tokens, case):
    experts = {
        "one expert": torch.full((tokens, 4), -1).index_fill(1, torch.tensor([2]), 5),
        "none": torch.full((tokens, 4), -1),
        "repeated": torch.randint(0, 2, (tokens, 4)),
        "out of range": torch.randint(-2000, 2000, (tokens, 4)) % 23 - 7,
    }[case].to(torch.int32)
    check(layout.local_layout(experts.to(DEVICE), 8, TILE_ROWS), experts, 8)


@pytest.mark.parametrize("tokens", [100, 1100])
def test_a_map_says_which_ids_are_local_and_where_they_stand(tokens):
    experts = torch.randint(-2, 20, (tokens, 4), dtype=torch.int32)
    of_id = torch.where(torch.rand(18) < 0.5, torch.arange(18) // 2, -1).to(torch.int32)
    local = torch.where(experts == -1, -1, 9).to(torch.int32)  # 9 is out of range, as 18 and 19 and -2 are
    known = (experts >= 0) & (experts < 18)
    local[known] = of_id[experts[known].long()]
    check(layout.local_layout(experts.to(DEVICE), 9, TILE_ROWS, of_id.to(DEVICE)), local, 9)


def test_extreme_ids_are_not_routed():
    limits = torch.iinfo(torch.int32)
    experts = torch.tensor([[limits.min, 0, limits.max], [7, 8, -1]], dtype=torch.int32)
    check(layout.local_layout(experts.to(DEVICE), 8, TILE_ROWS), experts, 8)
