"""The simulated schedule: bounds that hold for any durations, and the orders that it runs."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farskip_fused.connectivity import NAMES, Connectivity
from farskip_fused.plan.durations import Durations
from farskip_fused.plan.timeline import COMPUTE, LINK, compute_bound, simulate
from farskip_fused.schedule import (
    ACTIONS,
    BACKWARD_ACTIONS,
    BACKWARD_TRANSFERS,
    GATE,
    REDUCTIONS,
    TRANSFERS,
    backward_order,
    forward_order,
    tensor_parallel_order,
)

FARSKIP, STANDARD = Connectivity.farskip(), Connectivity.standard()
KINDS = {
    "forward": (ACTIONS, TRANSFERS, forward_order),
    "backward": (BACKWARD_ACTIONS, BACKWARD_TRANSFERS, backward_order),
    "tensor parallel": ((*ACTIONS, GATE), REDUCTIONS, tensor_parallel_order),
}
TOLERANCE = 1e-9
HELD = ("attention_core", "shared_experts")  # as of ``durations.py``


@st.composite
def problems(draw):
    """A kind of pass, durations for it, and whether it is a backward pass."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    actions, transfers, _ = KINDS[kind]
    pieces = draw(st.sampled_from([1, 1, 3]))
    durations = Durations(
        actions={action.name: draw(st.floats(0.01, 5.0)) for action in actions},
        transfers={name: draw(st.floats(0.0, 5.0)) for name in transfers},
        contention=draw(st.floats(0.0, 0.5)),
        pieces=pieces,
        early_combine=draw(st.booleans()),
        own=draw(st.floats(0.0, 1.0)),
        held={action.name: draw(st.floats(0.0, 5.0)) for action in actions if action.name in HELD},
    )
    return kind, durations


def run(kind, connectivity, durations, **options):
    return simulate(KINDS[kind][2](connectivity), durations, backward=kind == "backward", **options)


@given(problems())
def test_compute_is_at_most_farskip_is_at_most_standard_is_at_most_blocking(problem):
    kind, durations = problem
    compute = compute_bound(KINDS[kind][2](FARSKIP), durations)
    farskip, standard = (run(kind, one, durations).layer_time for one in (FARSKIP, STANDARD))
    blocking = run(kind, STANDARD, durations, blocking=True).layer_time
    assert max(compute, sum(durations.transfers.values())) <= farskip + TOLERANCE
    assert farskip <= standard + TOLERANCE
    assert standard <= blocking + TOLERANCE
    assert blocking == pytest.approx(compute + sum(durations.transfers.values()))


@given(problems())
def test_skipping_one_of_the_two_is_at_most_standard(problem):
    """Not always at least FarSkip: attention_only gives the combine the attention's core too."""
    kind, durations = problem
    if kind == "tensor parallel":
        return
    compute, standard = compute_bound(KINDS[kind][2](STANDARD), durations), run(kind, STANDARD, durations).layer_time
    for half in (Connectivity.attention_only(), Connectivity.moe_only()):
        assert compute - TOLERANCE <= run(kind, half, durations).layer_time <= standard + TOLERANCE


@given(problems(), st.floats(0.1, 1.0), st.sampled_from([FARSKIP, STANDARD]))
def test_a_faster_link_is_never_slower(problem, factor, connectivity):
    kind, durations = problem
    faster = replace(durations, transfers={name: time * factor for name, time in durations.transfers.items()})
    assert run(kind, connectivity, faster).makespan <= run(kind, connectivity, durations).makespan + TOLERANCE


@given(problems())
def test_lanes_carry_one_thing_at_a_time(problem):
    kind, durations = problem
    timeline = run(kind, FARSKIP, durations)
    for lane in (COMPUTE, LINK):
        assert all(before.end <= after.start + 1e-12 for before, after in pairwise(timeline.of(lane)))


@given(problems(), st.sampled_from([2, 3]))
def test_more_depth_is_never_slower_and_does_the_same_work(problem, depth):
    kind, durations = problem
    if kind == "tensor parallel":
        return
    order = KINDS[kind][2]
    shallow, deep = (
        simulate(order(Connectivity.farskip(one)), durations, backward=kind == "backward") for one in (depth - 1, depth)
    )
    assert deep.layer_time <= shallow.layer_time + TOLERANCE
    bound = max(compute_bound(order(FARSKIP), durations), sum(durations.transfers.values()))
    assert bound <= deep.layer_time + TOLERANCE
    without = Durations(durations.actions, durations.transfers)
    works = [
        sum(
            one.end - one.start
            for one in simulate(order(Connectivity.farskip(at)), without, backward=kind == "backward").of(COMPUTE)
        )
        for at in (1, depth)
    ]
    assert works[0] == pytest.approx(works[1])


@given(problems(), st.floats(0.0, 0.3))
def test_contention_costs_what_it_takes(problem, contention):
    kind, durations = problem
    alone = Durations(durations.actions, durations.transfers)
    shared = Durations(durations.actions, durations.transfers, contention)
    moved = sum(durations.transfers.values())
    times = [run(kind, FARSKIP, one).layer_time for one in (alone, shared)]
    assert times[0] <= times[1] + TOLERANCE
    assert times[1] <= times[0] + contention / (1 - contention) * moved + TOLERANCE


def timed(**times):
    return Durations(dict.fromkeys((action.name for action in ACTIONS), 0.0) | {"experts": 4.0} | times, {})


def test_a_hand_counted_layer():
    """Attention in halves of 2 and 3, experts 4, shared 1; dispatch 3, combine 3."""
    actions = timed(attention_projections=2.0, attention_core=3.0, shared_experts=1.0).actions
    durations = Durations(actions, {"dispatch": 3.0, "combine": 3.0})
    # Standard waits for all of the dispatch and for what of the combine the shared experts leave.
    assert simulate(forward_order(STANDARD), durations).layer_time == pytest.approx(2 + 3 + 3 + 4 + 3)
    assert simulate(forward_order(FARSKIP), durations).layer_time == pytest.approx(10)
    # Attention only: the dispatch stays exposed. MoE only: the combine beyond the shared experts.
    assert simulate(forward_order(Connectivity.attention_only()), durations).layer_time == pytest.approx(13)
    assert simulate(forward_order(Connectivity.moe_only()), durations).layer_time == pytest.approx(12)


def test_a_transfer_behind_a_kernel_that_holds_every_multiprocessor():
    """As above; the dispatch starts 2 of the core's 3 late, the combine behind the shared experts."""
    actions = timed(attention_projections=2.0, attention_core=3.0, shared_experts=1.0).actions
    held = {"attention_core": 2.0, "shared_experts": 5.0}
    durations = Durations(actions, {"dispatch": 3.0, "combine": 3.0}, held=held)
    assert simulate(forward_order(FARSKIP), durations).layer_time == pytest.approx(2 + 1 + 2 + 3 + 4 + 1)
    assert simulate(forward_order(STANDARD), durations).layer_time == pytest.approx(2 + 3 + 3 + 4 + 1 + 3)


def test_depth_widens_the_window_step_by_step():
    """5 ms of attention and shared experts, 4 of experts; transfers of 4 and 4 fit only behind the experts too."""
    actions = timed(attention_projections=2.0, attention_core=2.0, shared_experts=1.0).actions
    durations = Durations(actions, {"dispatch": 4.0, "combine": 4.0})
    times = [simulate(forward_order(Connectivity.farskip(depth)), durations).layer_time for depth in (1, 2, 3)]
    assert times[0] == pytest.approx(4 + 4 + 4)
    assert times[1:] == pytest.approx([9, 9])


def test_a_slower_link_than_the_layer_is_the_limit_at_depth_three():
    actions = timed(attention_projections=1.0, attention_core=1.0).actions
    durations = Durations(actions, {"dispatch": 5.0, "combine": 5.0})
    assert simulate(forward_order(Connectivity.farskip(3)), durations).layer_time == pytest.approx(10)


def test_the_first_gradients_of_a_backward_pass_are_exposed():
    durations = Durations(
        dict.fromkeys((action.name for action in BACKWARD_ACTIONS), 1.0), dict.fromkeys(BACKWARD_TRANSFERS, 4.0)
    )
    timeline = simulate(backward_order(STANDARD), durations, backward=True, layers=1)
    # shared experts 1, wait to 4, input gradients to 5, then 4 of transfer, in which weight gradients run
    assert timeline.makespan == pytest.approx(4 + 1 + 4 + 4)


@pytest.mark.parametrize(
    "connectivity", [*map(Connectivity.named, NAMES), Connectivity.farskip(2), Connectivity.farskip(3)], ids=str
)
def test_backward_holds_every_action_once(connectivity):
    order = backward_order(connectivity)
    assert sorted(action.name for action in order) == sorted(action.name for action in BACKWARD_ACTIONS)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_wait_is_for_something_launched_before(kind, depth):
    if kind == "tensor parallel" and depth > 1:
        return
    order = KINDS[kind][2](Connectivity.farskip(depth))
    launched, beyond = set(), max(-action.layer for action in order)
    turns = range(12 - 1 + beyond, -1, -1) if kind == "backward" else range(12 + beyond)
    for turn, layer in enumerate(turns):
        for action in order:
            of = layer + action.layer
            if action.waits_for is not None and turn > depth + 1 and 0 <= of < 12:
                assert (action.waits_for[0], of + action.waits_for[1]) in launched
            if action.launches is not None:
                launched.add((action.launches[0], of + action.launches[1]))
