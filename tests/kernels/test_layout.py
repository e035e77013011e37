"""Positions and the expert-sorted index, against the counting sort of the extension and a plain loop."""

import numpy as np
import pytest
import torch

from farskip_fused import _C
from farskip_fused.kernels import layout
from farskip_fused.symmetric.local import LocalMemory
from farskip_fused.symmetric.slots import SlotShape, open_slots
from tests.numerics import DEVICE


@pytest.fixture(scope="module")
def context():
    shape = SlotShape(max_tokens=4096, hidden_size=16, top_k=3, dtype=torch.float32)
    return open_slots(LocalMemory(torch.device(DEVICE), 5.0), shape).context


def random_experts(tokens, num_experts, top_k):
    experts = torch.rand(tokens, num_experts).argsort(dim=-1)[:, :top_k].to(torch.int32)
    return torch.where(torch.rand(experts.shape) < 0.2, -1, experts)


@pytest.mark.parametrize("tokens", [0, 1, 37, 1500])
def test_entries_are_sorted_by_expert_then_token_then_position(context, tokens):
    experts = random_experts(tokens, 8, 3)
    received = torch.tensor([tokens], dtype=torch.int32, device=DEVICE)
    counts, order = layout.expert_layout(context, experts.to(DEVICE), received, max(tokens, 1), 8, tokens * 3)
    expected_counts, expected_order = _C.layout(experts.numpy(), 8)
    assert np.array_equal(counts.cpu().numpy(), expected_counts)
    assert np.array_equal(order.cpu().numpy()[: len(expected_order)], expected_order)


def test_rows_that_did_not_arrive_are_left_out(context):
    experts = random_experts(40, 8, 3)
    received = torch.tensor([7, 0, 10, 3], dtype=torch.int32, device=DEVICE)  # of four sources with ten rows each
    counts, order = layout.expert_layout(context, experts.to(DEVICE), received, 10, 8, 120)
    row = torch.arange(40)
    valid = (row % 10 < received.cpu()[row // 10])[:, None] & (experts >= 0)
    expected = [
        token * 3 + k for expert in range(8) for token in range(40) for k in range(3)
        if valid[token, k] and experts[token, k] == expert
    ]  # fmt: skip
    assert int(counts.sum()) == len(expected)
    assert order.cpu().tolist()[: len(expected)] == expected


def test_a_row_goes_once_to_each_rank_in_token_order(context):
    experts = random_experts(1100, 8, 3)
    positions, counts = layout.send_layout(context, experts.to(DEVICE), 1, 8)
    wanted = (experts >= 0).any(dim=1)
    expected = torch.where(wanted, wanted.cumsum(0) - 1, -1)
    assert torch.equal(positions[:, 0].cpu().long(), expected)
    assert counts.tolist() == [int(wanted.sum())]
