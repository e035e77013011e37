"""The scheduled layer computes the plain definition of the streams bit for bit, outputs and gradients."""

import pytest
import torch
from torch import nn

import farskip_fused as ff
from farskip_fused.launch import run_ranks
from farskip_fused.layer import OverlappedLayer
from farskip_fused.schedule import ACTIONS, forward_order
from tests.layer_stack import (
    CONNECTIVITIES,
    HIDDEN,
    TOKENS,
    assert_equal,
    make_stack,
    outcome,
    random_problem,
    run_checkpointed,
    run_reference,
    run_schedule,
)
from tests.numerics import DEVICE
from tests.rungs import RUNGS

FARSKIP, DEEP, DEEPEST = (CONNECTIVITIES[name] for name in ("farskip", "farskip, depth 2", "farskip, depth 3"))


def compare(layers, embedding, gradient, run=run_schedule):
    assert_equal(outcome(run, layers, embedding, gradient), outcome(run_reference, layers, embedding, gradient))


def cases(cheap):
    """Every connectivity with and without shared experts; those that are not cheap under the mark "full"."""
    every = [(name, with_shared) for name in CONNECTIVITIES for with_shared in (True, False)]
    return [
        pytest.param(
            CONNECTIVITIES[name], with_shared, id=f"{name}, {'shared' if with_shared else 'no shared'} experts",
            marks=() if (name, with_shared) in cheap else pytest.mark.full,
        )
        for name, with_shared in every
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("connectivity", "with_shared"),
    cases([("farskip", True), ("farskip, depth 2", True)]),
)
def test_schedule_equals_definition(monkeypatch, connectivity, with_shared):
    monkeypatch.setattr(ff.FusedExperts, "is_alone", False)  # through the slots, as on several ranks
    layers = make_stack([connectivity] * (connectivity.depth + 1), with_shared, ff.init(device=DEVICE))
    compare(layers, *random_problem())


@pytest.mark.parametrize(("connectivity", "with_shared"), cases([("moe_only", True), ("attention_only", True)]))
def test_schedule_equals_definition_on_a_rank_without_slots(connectivity, with_shared):
    compare(make_stack([connectivity] * (connectivity.depth + 1), with_shared), *random_problem())


@pytest.mark.full
def test_layers_of_several_connectivities_equal_the_definition(monkeypatch):
    monkeypatch.setattr(ff.FusedExperts, "is_alone", False)
    names = ["farskip", "farskip, depth 3", "standard", "farskip, depth 2", "moe_only", "attention_only", "standard"]
    layers = make_stack([CONNECTIVITIES[name] for name in names], True, ff.init(device=DEVICE))
    for run in (run_schedule, run_checkpointed):
        compare(layers, *random_problem(), run)


def test_standard_connectivity_equals_a_stock_layer():
    (layer,) = make_stack([CONNECTIVITIES["standard"]], True)

    def stock(_, hidden_states):
        normed = layer.attention_norm(hidden_states)
        hidden_states = hidden_states + layer.attention.attend(layer.attention.project(normed))
        normed = layer.moe_norm(hidden_states)
        return hidden_states + (layer.moe(normed) + layer.shared_experts(normed))

    problem, layers = random_problem(), nn.ModuleList([layer])
    for run in (run_schedule, run_reference):
        assert_equal(outcome(run, layers, *problem), outcome(stock, layers, *problem))


@pytest.mark.parametrize(
    ("connectivity", "in_slots", "keep_received"),
    [
        pytest.param(FARSKIP, True, True, id="slots"),
        pytest.param(DEEP, True, True, id="slots, depth 2", marks=pytest.mark.full),
        pytest.param(FARSKIP, True, False, id="slots, rows dispatched again", marks=pytest.mark.full),
        pytest.param(DEEPEST, True, True, id="slots, depth 3", marks=pytest.mark.full),
        pytest.param(FARSKIP, False, True, id="one rank", marks=pytest.mark.full),
        pytest.param(DEEP, False, True, id="one rank, depth 2", marks=pytest.mark.full),
    ],
)
def test_checkpointed_layers_give_the_same_gradients_step_after_step(
    monkeypatch, connectivity, in_slots, keep_received
):
    monkeypatch.setattr(ff.FusedExperts, "is_alone", not in_slots)
    memory = ff.init(device=DEVICE)
    exchange = ff.ExchangeOptions(keep_received=keep_received)
    layers = make_stack([connectivity] * (connectivity.depth + 1), False, memory, exchange=exchange)
    for _ in range(2):
        problem = random_problem()
        assert_equal(*(outcome(run, layers, *problem) for run in (run_checkpointed, run_schedule)))
    assert len(memory.buffers) == in_slots and not any(slots.open_rounds for slots in memory.buffers.values())


def test_gradients_of_micro_batches_accumulate():
    layers = make_stack([FARSKIP], True)
    problems = [random_problem() for _ in range(2)]
    accumulated = []
    for run in (run_reference, run_schedule):
        layers.zero_grad()
        for embedding, gradient in problems:
            run(layers, embedding).backward(gradient)
        accumulated.append({name: parameter.grad.clone() for name, parameter in layers.named_parameters()})
    assert_equal(*accumulated)


def compare_on_rank(memory, cases, with_shared):
    """cases: connectivities, each with what to compare to the reference."""
    for connectivity, runs in cases:
        layers = make_stack([connectivity] * (connectivity.depth + 1), with_shared, memory, memory.device)
        torch.manual_seed(memory.rank + 1)
        problem = random_problem(memory.device, TOKENS - memory.rank)
        expected = outcome(run_reference, layers, *problem)
        for run in runs:
            assert_equal(outcome(run, layers, *problem), expected)


@pytest.mark.parametrize("device", RUNGS)
def test_schedule_equals_definition_on_two_ranks(device):
    run_ranks(compare_on_rank, 2, [(FARSKIP, [run_schedule]), (DEEP, [run_checkpointed])], True, device=device)


@pytest.mark.full
@pytest.mark.parametrize("with_shared", [False, True], ids=["no shared experts", "shared experts"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("device", RUNGS)
def test_every_connectivity_equals_its_definition_on_several_ranks(device, world, with_shared):
    cases = [(connectivity, [run_schedule, run_checkpointed]) for connectivity in CONNECTIVITIES.values()]
    run_ranks(compare_on_rank, world, cases, with_shared, device=device, limit=1200)


@pytest.mark.parametrize("connectivity", CONNECTIVITIES.values(), ids=CONNECTIVITIES)
def test_every_order_holds_every_action_once(connectivity):
    assert sorted(action.name for action in forward_order(connectivity)) == sorted(action.name for action in ACTIONS)


def test_attention_in_one_piece_is_refused():
    moe = ff.FusedMoE(HIDDEN, 24, 4, 2, max_tokens=4)
    with pytest.raises(TypeError, match=r"no method project\(\)"):
        OverlappedLayer(nn.Identity(), moe, attention_norm=nn.Identity(), moe_norm=nn.Identity())


def test_too_few_slots_are_refused(monkeypatch):
    monkeypatch.setattr(ff.FusedExperts, "is_alone", False)
    memory = ff.init(device=DEVICE)
    with pytest.raises(ff.UsageError, match=r"slots for 2 rounds .* depth 2 needs 3; make it with depth=3"):
        make_stack([DEEP], False, memory, depth=2)
    layers = make_stack([DEEP], False, memory, depth=3)
    embedding, gradient = random_problem()
    result = run_checkpointed(layers, embedding)
    with pytest.raises(ff.UsageError, match=r"depth 2 with activation checkpointing needs 4"):
        result.backward(gradient)


def test_a_layer_deeper_than_the_first_is_refused_unless_the_first_is_told():
    first, second = make_stack([FARSKIP, DEEP], False)
    embedding, _ = random_problem()
    with pytest.raises(ff.UsageError, match=r"depth 2 was given what layers of depth 1 carry; .* depth=2"):
        second(first(embedding))
    assert torch.equal(second(first(ff.Carry(embedding, depth=2))).full(), run_reference([first, second], embedding))
