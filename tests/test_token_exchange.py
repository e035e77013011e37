"""Dispatch and combine around experts of the caller's own: numbers against float64, and what is refused."""

import pytest
import torch

import farskip_fused as ff
from farskip_fused import reference
from farskip_fused.kernels import protocol
from farskip_fused.launch import run_ranks
from tests.numerics import DEVICE, assert_close
from tests.rungs import RUNGS
from tests.symmetric import rank_programs
from tests.symmetric.rank_programs import experts_of_a_user

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, MAX_TOKENS = 48, 40, 8, 3, 32


def make_exchange(hidden=HIDDEN, dtype=torch.float32, **options):
    exchange = ff.TokenExchange(
        ff.init(device=DEVICE), hidden_size=hidden, num_experts=EXPERTS, top_k=TOP_K, max_tokens=MAX_TOKENS,
        dtype=dtype, options=ff.ExchangeOptions(**options),
    )  # fmt: skip
    exchange.setup()
    return exchange


@pytest.fixture(scope="module")
def exchange():
    return make_exchange()


@pytest.fixture(scope="module")
def half_exchange():
    return make_exchange(dtype=torch.float16)


def random_weights(hidden=HIDDEN, dtype=torch.float32):
    """w13 and w2 of all experts."""
    shapes = ((EXPERTS, 2 * INTERMEDIATE, hidden), (EXPERTS, hidden, INTERMEDIATE))
    return [(torch.randn(shape, device=DEVICE, dtype=dtype) / shape[-1] ** 0.5).requires_grad_() for shape in shapes]


def random_input(tokens, hidden=HIDDEN, dtype=torch.float32):
    """Hidden states, ids and router weights."""
    index = torch.rand(tokens, EXPERTS, device=DEVICE).argsort(dim=-1)[:, :TOP_K]
    hidden_states = torch.randn(tokens, hidden, device=DEVICE, dtype=dtype)
    return hidden_states, index, torch.rand(tokens, TOP_K, device=DEVICE) + 0.1


def run(exchange, hidden_states, index, weights, own, **extras):
    handle = ff.dispatch_send(exchange, hidden_states, index, weights)
    rows, offsets = ff.dispatch_wait(handle)
    ff.combine_send(handle, experts_of_a_user(rows, offsets, *own))
    return ff.combine_wait(handle, **extras)


def check_against_reference(exchange, hidden_states, index, weights, own):
    dtype = hidden_states.dtype
    inputs = (hidden_states.requires_grad_(), weights.requires_grad_(), *own)
    result = run(exchange, hidden_states, index, weights, own)
    gradient = torch.randn_like(result)
    result.backward(gradient)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    expected = reference.experts(exact[0], index, *exact[1:])
    expected.backward(gradient.double())
    assert_close(result, expected, dtype)
    for value, wanted in zip(inputs, exact, strict=True):
        assert_close(value.grad, wanted.grad, dtype)


@pytest.mark.parametrize("case", ["even", "one expert", "unrouted positions", "unrouted tokens", "unaligned"])
def test_forward_and_every_gradient_match_float64(exchange, case):
    hidden_states, index, weights = random_input(29)
    if case == "one expert":
        index = torch.tensor([5, -1, -1], device=DEVICE).expand(29, 3)
    elif case == "unrouted positions":
        index = torch.where(torch.rand(index.shape, device=DEVICE) < 0.5, -1, index)
    elif case == "unrouted tokens":
        index[::2] = -1
    elif case == "unaligned":
        hidden_states, index, weights = (value[1:] for value in (hidden_states, index.int(), weights))
    check_against_reference(exchange, hidden_states, index, weights, random_weights())


def test_half_precision_sums_in_float32(half_exchange):
    check_against_reference(half_exchange, *random_input(20, dtype=torch.float16), random_weights(dtype=torch.float16))


def test_rows_are_sorted_by_expert_then_token(exchange):
    hidden_states, index, weights = random_input(10)
    handle = ff.dispatch_send(exchange, hidden_states, index, weights)
    rows, offsets = ff.dispatch_wait(handle)
    tokens = [(index == expert).any(dim=1).nonzero()[:, 0] for expert in range(EXPERTS)]
    assert offsets.tolist() == [0, *torch.tensor([len(each) for each in tokens]).cumsum(0).tolist()]
    assert rows.shape == (MAX_TOKENS * TOP_K, HIDDEN)
    assert torch.equal(rows[: offsets[-1]], hidden_states[torch.cat(tokens)])
    ff.combine_send(handle, rows)
    ff.combine_wait(handle)


def test_rows_that_travel_as_fp8_arrive_rounded():
    exchange = make_exchange(hidden=200, fp8=True)
    hidden_states, index, weights = random_input(20, hidden=200)
    handle = ff.dispatch_send(exchange, hidden_states, index, weights)
    rows, offsets = ff.dispatch_wait(handle)
    sent = hidden_states[torch.cat([(index == expert).any(dim=1).nonzero()[:, 0] for expert in range(EXPERTS)])]
    groups = torch.nn.functional.pad(sent, (0, -200 % 128)).unflatten(1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True) / 448
    rounded = ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(1)[:, :200]
    assert_close(rows[: offsets[-1]], rounded, torch.float32)
    ff.combine_send(handle, rows)
    ff.combine_wait(handle)


def test_two_rounds_overlap_in_any_order_of_their_steps(exchange):
    own = random_weights()
    inputs = [random_input(9) for _ in range(2)]
    alone = [run(exchange, *each, own) for each in inputs]
    first, second = (ff.dispatch_send(exchange, *each) for each in inputs)
    for handle in (second, first):
        ff.combine_send(handle, experts_of_a_user(*ff.dispatch_wait(handle), *own))
    assert torch.equal(ff.combine_wait(first), alone[0])
    assert torch.equal(ff.combine_wait(second), alone[1])


def test_a_layer_of_the_same_shape_shares_the_slots_and_may_be_in_flight_too(exchange, monkeypatch):
    monkeypatch.setattr(ff.FusedExperts, "is_alone", False)
    layer = ff.FusedExperts(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, ep=exchange.ep, max_tokens=MAX_TOKENS)
    layer.setup()
    assert len(exchange.ep.buffers) == 1
    inputs, own = random_input(9), (layer.w13, layer.w2)
    pending = layer.dispatch(*inputs)
    handle = ff.dispatch_send(exchange, *inputs)
    pending.experts()
    ff.combine_send(handle, experts_of_a_user(*ff.dispatch_wait(handle), *own))
    assert_close(ff.combine_wait(handle), pending.finish().double(), torch.float32)


@pytest.mark.parametrize("needed", ["experts", "router weights", "hidden states"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(exchange, needed):
    hidden_states, index, weights = random_input(9)
    own = random_weights()
    inputs = {"hidden states": [hidden_states], "router weights": [weights], "experts": own}
    gradients = []
    for kinds in (inputs, (needed,)):
        for kind, tensors in inputs.items():
            for tensor in tensors:
                tensor.grad = None
                tensor.requires_grad_(kind in kinds)
        run(exchange, hidden_states, index, weights, own).sum().backward()
        gradients.append([tensor.grad for tensor in inputs[needed]])
        assert not exchange._exchange.slots.open_rounds
    assert all(torch.equal(whole, partial) for whole, partial in zip(*gradients, strict=True))
    assert all(tensor.grad is None for kind in inputs if kind != needed for tensor in inputs[kind])


def test_gradient_checkpointing_gives_the_same_gradients_step_after_step(exchange):
    own = random_weights()
    hidden_states, index, weights = random_input(20)
    hidden_states.requires_grad_()
    for _ in range(3):
        results = []
        for checkpointed in (False, True):
            for tensor in (hidden_states, *own):
                tensor.grad = None
            arguments = (exchange, hidden_states, index, weights, own)
            if checkpointed:
                result = torch.utils.checkpoint.checkpoint(run, *arguments, use_reentrant=False)
            else:
                result = run(*arguments)
            result.square().sum().backward()
            results.append((result, hidden_states.grad, own[0].grad, own[1].grad))
        assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))
    assert not exchange._exchange.slots.open_rounds


def test_shared_output_residual_and_norm_are_those_of_separate_operations_bit_for_bit(half_exchange):
    # Powers of two and small integers: all sums are exact, so that their order is of no matter.
    hidden_states = torch.randint(-8, 9, (20, HIDDEN), device=DEVICE).half()
    index, weights = random_input(20)[1], torch.full((20, TOP_K), 0.25, device=DEVICE)
    shared, residual, norm_weight = (
        torch.randint(-8, 9, (20, HIDDEN), device=DEVICE).half(),
        torch.randint(-8, 9, (20, HIDDEN), device=DEVICE).half(),
        torch.randn(HIDDEN, device=DEVICE).half(),
    )

    def run_identity(**extras):
        handle = ff.dispatch_send(half_exchange, hidden_states, index, weights)
        ff.combine_send(handle, ff.dispatch_wait(handle).rows)
        return ff.combine_wait(handle, **extras)

    plain = run_identity()
    for extras in ({}, {"shared": shared}, {"residual": residual}, {"shared": shared, "residual": residual}):
        expected = plain
        for value in extras.values():
            expected = value + expected
        total, normed = run_identity(**extras, norm_weight=norm_weight, norm_epsilon=1e-5)
        assert torch.equal(total, expected)
        assert torch.equal(run_identity(**extras), expected)
        wide = expected.float()
        scale = 1 / (wide.square().sum(-1, keepdim=True) / HIDDEN + 1e-5).sqrt()
        assert torch.equal(normed, (wide * scale).half() * norm_weight)


def test_additions_are_rounded_as_separate_ones_and_have_gradients(half_exchange):
    own = random_weights(dtype=torch.float16)
    inputs = random_input(20, dtype=torch.float16)
    shared, residual = (torch.randn(20, HIDDEN, device=DEVICE).half().requires_grad_() for _ in range(2))
    result = run(half_exchange, *inputs, own, shared=shared, residual=residual)
    assert torch.equal(result, residual + (run(half_exchange, *inputs, own) + shared))
    gradient = torch.randn_like(result)
    result.backward(gradient)
    assert torch.equal(shared.grad, gradient) and torch.equal(residual.grad, gradient)


def test_a_failed_context_gives_no_finite_gradient():
    exchange = make_exchange()
    own = random_weights()
    hidden_states, index, weights = random_input(9)
    result = run(exchange, hidden_states.requires_grad_(), index, weights, own)
    exchange._exchange.slots.context[protocol.FAILED.value] = 1  # as an expired wait leaves it, before the host looks
    result.sum().backward()
    routed = [expert for expert in range(EXPERTS) if (index == expert).any()]
    assert not torch.isfinite(hidden_states.grad).any()
    assert not torch.isfinite(own[1].grad[routed]).all(dim=(1, 2)).any()


@pytest.mark.parametrize("device", RUNGS)
@pytest.mark.parametrize(
    "by_put", [pytest.param(False, id="stores"), pytest.param(True, id="puts", marks=pytest.mark.full)]
)
def test_ranks_with_experts_of_their_own_compute_what_float64_does_under_skew(device, by_put):
    rounds = 80 if device != "cpu" else 3 if by_put else 6
    run_ranks(rank_programs.exchange_with_own_experts, 2, rounds, 0.05, device=device, wait_timeout=30.0, by_put=by_put)


class TestBadInput:
    @pytest.mark.parametrize(
        ("hidden_states", "index", "weights", "error", "sentence"),
        [
            (torch.zeros(4, 47), None, None, ff.UsageError, r"\[4, 47\].*48"),
            (torch.zeros(4, 48).double(), None, None, TypeError, "float64.*float32"),
            (torch.zeros(33, 48), None, None, ff.UsageError, "33 tokens.*max_tokens is 32"),
            (torch.zeros(4, 48), torch.zeros(4, 2).long(), None, ff.UsageError, r"\[4, 3\]"),
            (torch.zeros(4, 48), torch.zeros(4, 3), None, TypeError, "integers"),
            (torch.zeros(4, 48), None, torch.zeros(4, 3).long(), TypeError, "floating point"),
        ],
    )
    def test_of_dispatch_is_named_in_one_sentence(self, exchange, hidden_states, index, weights, error, sentence):
        tokens = hidden_states.shape[0]
        index = torch.arange(3).expand(tokens, 3) if index is None else index
        weights = torch.ones(tokens, 3) if weights is None else weights
        with pytest.raises(error, match=sentence):
            ff.dispatch_send(exchange, *(value.to(DEVICE) for value in (hidden_states, index, weights)))
        assert not exchange._exchange.slots.open_rounds

    def test_of_combine_is_named_and_the_round_goes_on(self, exchange):
        handle = ff.dispatch_send(exchange, *random_input(5))
        with pytest.raises(RuntimeError, match=r"combine_send\(\) was called before dispatch_wait\(\)"):
            ff.combine_send(handle, torch.zeros(MAX_TOKENS * TOP_K, HIDDEN, device=DEVICE))
        rows, _ = ff.dispatch_wait(handle)
        with pytest.raises(RuntimeError, match=r"dispatch_wait\(\) was called twice"):
            ff.dispatch_wait(handle)
        with pytest.raises(ff.UsageError, match=r"Outputs of \[95, 48\] was given; \[96, 48\]"):
            ff.combine_send(handle, rows[1:])
        with pytest.raises(TypeError, match="float16"):
            ff.combine_send(handle, rows.half())
        ff.combine_send(handle, rows)
        with pytest.raises(ff.UsageError, match=r"residual of \[4, 48\]"):
            ff.combine_wait(handle, residual=torch.zeros(4, HIDDEN, device=DEVICE))
        with pytest.raises(RuntimeError, match="norm where a gradient is needed"):
            ff.combine_wait(handle, norm_weight=torch.ones(HIDDEN, device=DEVICE, requires_grad=True))
        assert ff.combine_wait(handle).shape == (5, HIDDEN)
        with pytest.raises(RuntimeError, match=r"combine_wait\(\) was called twice"):
            ff.combine_wait(handle)

    def test_gradients_of_rows_without_those_of_the_result_are_refused(self, exchange):
        hidden_states, index, weights = random_input(5)
        handle = ff.dispatch_send(exchange, hidden_states.requires_grad_(), index, weights)
        rows, _ = ff.dispatch_wait(handle)
        ff.combine_send(handle, rows)
        ff.combine_wait(handle)
        with pytest.raises(RuntimeError, match="let its result take part"):
            rows.sum().backward()

    @pytest.mark.parametrize("wrong", [8, -2])
    def test_expert_ids_out_of_range_are_named(self, exchange, wrong):
        index = torch.tensor([[0, 1, wrong]], device=DEVICE)
        exchange = exchange if DEVICE == "cpu" else make_exchange()
        with pytest.raises(ff.UsageError, match="from 0 to 7"):
            ff.dispatch_send(exchange, torch.zeros(1, HIDDEN, device=DEVICE), index, torch.ones(1, 3, device=DEVICE))
            exchange.ep.synchronize()

    def test_more_pairs_than_were_planned_for_are_refused(self):
        exchange = make_exchange(max_pairs=50)
        run(exchange, *random_input(16), random_weights())
        with pytest.raises(ff.UsageError, match=r"51 \(token, expert\) pairs and can take 50; raise max_pairs"):
            run(exchange, *random_input(17), random_weights())
            exchange.ep.synchronize()

    def test_a_round_before_setup_is_refused(self):
        exchange = ff.TokenExchange(ff.init(device=DEVICE), hidden_size=8, num_experts=4, top_k=3, max_tokens=4)
        assert exchange.size_hint()["total"] == sum(exchange.slot_shape.regions(1).values())
        with pytest.raises(RuntimeError, match=r"call setup\(\)"):
            ff.dispatch_send(exchange, *random_input(1, hidden=8))

    @pytest.mark.parametrize(
        ("sizes", "error", "sentence"),
        [
            ({"top_k": 5}, ff.UsageError, "top_k is 5 and there are only 4"),
            ({"hidden_size": 0}, ff.UsageError, "hidden_size is 0"),
            ({"max_tokens": 4.0}, TypeError, "max_tokens is 4.0"),
            ({"dtype": torch.float64}, TypeError, "float64"),
            ({"depth": 1}, ff.UsageError, "at least 2"),
            ({"options": ff.ExchangeOptions(keep_received=False)}, ff.UsageError, "keep_received=False"),
        ],
    )
    def test_impossible_exchanges_are_refused(self, sizes, error, sentence):
        whole = {"hidden_size": 8, "num_experts": 4, "top_k": 2, "max_tokens": 4} | sizes
        with pytest.raises(error, match=sentence):
            ff.TokenExchange(ff.init(device=DEVICE), **whole)
