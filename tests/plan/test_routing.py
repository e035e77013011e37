"""Sampled routing against what can be counted."""

from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farskip_fused.plan.routing import sample


def test_uniform_routing_reaches_the_expected_number_of_ranks():
    routing = sample(64, 6, 1, 1, 0.0, 8, 8, 4096)
    assert routing.remote_ranks == pytest.approx(7 * (1 - comb(56, 6) / comb(64, 6)), rel=0.02)
    assert routing.near_rows == pytest.approx(6 * 7 / 8, rel=0.02)
    assert routing.remote_nodes == routing.remote_rows == routing.forwarded == 0


def test_rows_that_go_everywhere():
    routing = sample(8, 8, 1, 1, 0.0, 4, 2, 100)
    assert (routing.remote_ranks, routing.near_ranks, routing.remote_nodes) == (3, 1, 1)
    assert (routing.remote_rows, routing.near_rows, routing.forwarded) == (4, 2, 2)


def test_a_limit_to_groups_limits_nodes():
    limited, free = (sample(256, 8, 8, kept, 0.0, 64, 8, 1024) for kept in (4, 8))
    assert limited.remote_nodes <= 4 < free.remote_nodes


def test_one_rank_has_nothing_to_send():
    routing = sample(8, 2, 1, 1, 1.0, 1, 8, 100)
    assert (routing.busiest, routing.remote_ranks, routing.remote_rows, routing.near_rows) == (1.0, 0, 0, 0)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([2, 4, 8, 16]), st.sampled_from([1, 2, 8]), st.sampled_from([0.0, 0.5, 1.0]))
def test_counts_are_consistent(ranks, node, skew):
    routing = sample(32, 4, 1, 1, skew, ranks, node, 512)
    assert 1 <= routing.busiest <= ranks
    assert routing.near_ranks + routing.forwarded == pytest.approx(routing.remote_ranks)
    assert routing.remote_nodes <= routing.forwarded + 1e-9
    assert routing.remote_ranks <= routing.remote_rows + routing.near_rows + 1e-9 <= 4 + 1e-9


def test_skew_and_few_tokens_load_the_busiest_rank():
    even, skewed = (sample(64, 6, 1, 1, skew, 8, 8, 4096).busiest for skew in (0.0, 1.0))
    assert even < 1.02 < 1.3 < skewed
    assert sample(64, 6, 1, 1, 0.0, 8, 8, 4).busiest > 1.2
