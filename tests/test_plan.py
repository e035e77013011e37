"""The simulated schedule: bounds that hold for any durations, and the order that the streams demand."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import farskip_fused as ff
from farskip_fused.connectivity import NAMES
from farskip_fused.plan import CLUSTERS, SHAPES, Durations, draw, estimate, simulate
from farskip_fused.plan.durations import distinct_remote_ranks
from farskip_fused.plan.timeline import COMPUTE, LINK
from farskip_fused.schedule import ACTIONS, TRANSFERS

milliseconds = st.floats(0.0, 5.0)
durations = st.builds(
    Durations,
    actions=st.fixed_dictionaries({action.name: st.floats(0.01, 5.0) for action in ACTIONS}),
    transfers=st.fixed_dictionaries(dict.fromkeys(TRANSFERS, milliseconds)),
)


@given(durations)
def test_farskip_lies_between_the_bounds_and_standard(durations):
    compute, link = sum(durations.actions.values()), sum(durations.transfers.values())
    standard = simulate(ff.Connectivity.standard(), durations).layer_time
    farskip = simulate(ff.Connectivity.farskip(), durations).layer_time
    assert max(compute, link) <= farskip + 1e-9
    assert farskip <= standard + 1e-9
    assert standard <= compute + link + 1e-9


@given(durations, st.sampled_from(NAMES))
def test_lanes_carry_one_thing_at_a_time(durations, name):
    timeline = simulate(ff.Connectivity.named(name), durations)
    for lane in (COMPUTE, LINK):
        intervals = [one for one in timeline.intervals if one.lane == lane]
        assert all(before.end <= after.start for before, after in pairwise(intervals))


@given(durations, st.sampled_from(NAMES), st.floats(0.1, 1.0))
def test_a_faster_link_is_never_slower(durations, name, factor):
    faster = Durations(durations.actions, {key: value * factor for key, value in durations.transfers.items()})
    slow, fast = (simulate(ff.Connectivity.named(name), one).layer_time for one in (durations, faster))
    assert fast <= slow + 1e-9


def test_one_rank_has_no_communication():
    one = estimate(SHAPES["qwen3-30b-a3b"], CLUSTERS["h100-ib400"], tokens=4096, sequence=4096, ranks=1)
    assert set(one.transfers.values()) == {0.0}


def test_distinct_ranks_are_exact_where_they_can_be_counted():
    assert distinct_remote_ranks(experts=8, top_k=8, ranks=4) == 3
    assert distinct_remote_ranks(experts=4, top_k=1, ranks=4) == pytest.approx(3 / 4)


def test_impossible_splits_are_refused():
    with pytest.raises(ff.UsageError, match="64 experts do not divide over 7 ranks"):
        estimate(SHAPES["deepseek-v2-lite"], CLUSTERS["h100-ib400"], tokens=1, sequence=1, ranks=7)


def test_the_figure_is_drawn(tmp_path):
    shape, cluster = SHAPES["deepseek-v2-lite"], CLUSTERS["h100-ib400"]
    draw(tmp_path / "schedule.png", estimate(shape, cluster, tokens=4096, sequence=4096, ranks=8), "a caption")
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")
