"""The MoE layer of one rank, alone and on the slots of a world of one: numbers against float64, and what is refused."""

import pytest
import torch

import farskip_fused as ff
from farskip_fused import reference
from farskip_fused.kernels import experts, protocol
from tests.numerics import DEVICE, assert_close, relative_error

# The interpreter has no bfloat16 dot; float16 takes the same path there.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture
def slots(monkeypatch):
    """A world of one through the slots, as larger worlds go."""
    monkeypatch.setattr(ff.FusedExperts, "is_alone", False)
    return ff.init(device=DEVICE)


@pytest.fixture(params=["alone", "slots"])
def memory(request):
    return None if request.param == "alone" else request.getfixturevalue("slots")


def make_experts(
    memory, hidden=48, intermediate=40, num_experts=8, top_k=3, dtype=torch.float32, max_tokens=64, **options
):
    layer = ff.FusedExperts(
        hidden,
        intermediate,
        num_experts,
        top_k,
        ep=memory,
        max_tokens=max_tokens,
        device=DEVICE,
        dtype=dtype,
        **options,
    )
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn_like(weight) / weight.shape[-1] ** 0.5)
    layer.setup()
    return layer


def random_routing(tokens, num_experts, top_k):
    index = torch.rand(tokens, num_experts, device=DEVICE).argsort(dim=-1)[:, :top_k]
    return index, torch.rand(tokens, top_k, device=DEVICE) + 0.1


def check_against_reference(layer, hidden_states, index, weights, received=None):
    """received: what the experts are given for the hidden states, where that differs."""
    dtype = layer.w13.dtype
    received = hidden_states if received is None else received
    hidden_states.requires_grad_(), weights.requires_grad_()
    result = layer(hidden_states, index, weights)
    gradient = torch.randn_like(result)
    result.backward(gradient)
    exact = [value.detach().double().requires_grad_() for value in (received, weights, layer.w13, layer.w2)]
    expected = reference.experts(exact[0], index, exact[1], exact[2], exact[3])
    expected.backward(gradient.double())
    assert_close(result, expected, dtype)
    for value, reference_value in zip((hidden_states, weights, layer.w13, layer.w2), exact, strict=True):
        assert_close(value.grad, reference_value.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate", "num_experts", "top_k"),
    [(1, 64, 16, 4, 4), (37, 96, 72, 8, 3), (64, 33, 17, 5, 5), (50, 130, 150, 4, 2), (7, 64, 64, 16, 2)],
)
def test_forward_and_every_gradient_match_float64(memory, dtype, tokens, hidden, intermediate, num_experts, top_k):
    layer = make_experts(memory, hidden, intermediate, num_experts, top_k, dtype)
    index, weights = random_routing(tokens, num_experts, top_k)
    check_against_reference(layer, torch.randn(tokens, hidden, device=DEVICE, dtype=dtype), index, weights)


@pytest.mark.parametrize("case", ["one expert", "unrouted positions", "unrouted tokens"])
def test_uneven_routing_is_ordinary(memory, case):
    layer = make_experts(memory)
    index, weights = random_routing(40, 8, 3)
    if case == "one expert":
        index = torch.tensor([5, -1, -1], device=DEVICE).expand(40, 3).contiguous()
    elif case == "unrouted positions":
        index = torch.where(torch.rand(index.shape, device=DEVICE) < 0.5, -1, index)
    else:
        index[::2] = -1
    check_against_reference(layer, torch.randn(40, 48, device=DEVICE), index, weights)


def test_no_tokens_give_no_rows_and_zero_gradients(memory):
    layer = make_experts(memory)
    hidden_states = torch.empty(0, 48, device=DEVICE, requires_grad=True)
    result = layer(hidden_states, torch.empty(0, 3, dtype=torch.long, device=DEVICE), torch.empty(0, 3, device=DEVICE))
    result.sum().backward()
    assert result.shape == (0, 48)
    assert hidden_states.grad.shape == (0, 48)
    assert not layer.w13.grad.any() and not layer.w2.grad.any()


def test_two_runs_are_bitwise_equal(memory):
    layer = make_experts(memory)
    hidden_states, (index, weights) = torch.randn(50, 48, device=DEVICE), random_routing(50, 8, 3)
    first = layer(hidden_states, index, weights)
    layer(torch.randn(13, 48, device=DEVICE), *random_routing(13, 8, 3))  # leaves other rows in the slots
    assert torch.equal(layer(hidden_states, index, weights), first)


def test_frozen_weights_and_frozen_input_still_give_the_other_gradients(memory):
    layer = make_experts(memory)
    index, weights = random_routing(20, 8, 3)
    layer.w2.requires_grad_(False)
    layer(torch.randn(20, 48, device=DEVICE), index, weights).sum().backward()
    assert layer.w13.grad is not None and layer.w2.grad is None
    layer.w13.requires_grad_(False)
    hidden_states = torch.randn(20, 48, device=DEVICE, requires_grad=True)
    layer(hidden_states, index, weights).sum().backward()  # the slot of the round before was given back
    layer(hidden_states, index, weights).sum().backward()
    assert hidden_states.grad is not None


def test_split_calls_equal_one_call_and_overlap_two_rounds(memory):
    layer = make_experts(memory)
    inputs = [(torch.randn(9, 48, device=DEVICE), *random_routing(9, 8, 3)) for _ in range(2)]
    whole = [layer(*arguments) for arguments in inputs]
    first, second = (layer.dispatch(*arguments) for arguments in inputs)
    second.experts()
    first.experts()
    assert torch.equal(first.finish(), whole[0])
    assert torch.equal(second.finish(), whole[1])


def test_more_rounds_in_flight_than_slots_are_refused(slots):
    layer = make_experts(slots)
    arguments = (torch.randn(2, 48, device=DEVICE), *random_routing(2, 8, 3))
    pending = [layer.dispatch(*arguments), layer.dispatch(*arguments)]
    with pytest.raises(RuntimeError, match="oldest of 2 rounds in flight"):
        layer.dispatch(*arguments)
    for round_ in pending:
        round_.finish()
    with pytest.raises(RuntimeError, match="twice"):
        pending[0].finish()


def test_layers_of_one_shape_share_their_slots(slots):
    layers = [ff.FusedExperts(32, 16, 4, 2, ep=slots, max_tokens=8) for _ in range(2)]
    for layer in layers:
        layer.setup()
    (shared,) = slots.buffers.values()
    assert shared.buffer.memory.numel() == layers[0].size_hint()["total"]


def test_gradient_checkpointing_gives_the_same_gradients_step_after_step(memory):
    layer = make_experts(memory)
    index, weights = random_routing(20, 8, 3)
    for step in range(1 if memory is None else 4):
        results = []
        for checkpointed in (False, True):
            generator = torch.Generator(DEVICE).manual_seed(step)
            hidden_states = torch.randn(20, 48, device=DEVICE, generator=generator, requires_grad=True)
            layer.zero_grad()
            if checkpointed:
                result = torch.utils.checkpoint.checkpoint(layer, hidden_states, index, weights, use_reentrant=False)
            else:
                result = layer(hidden_states, index, weights)
            result.square().sum().backward()
            results.append((result, hidden_states.grad, layer.w13.grad.clone(), layer.w2.grad.clone()))
        assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))
    assert memory is None or not layer._exchange.slots.open_rounds


def test_the_slot_of_an_unfinished_round_is_not_given_away(slots):
    layer = make_experts(slots)
    first, second, third = ((torch.randn(9, 48, device=DEVICE), *random_routing(9, 8, 3)) for _ in range(3))
    expected = layer(*first)
    pending = layer.dispatch(*first)
    layer(*second)
    with pytest.raises(RuntimeError, match=r"oldest of 1 rounds in flight"):
        layer.dispatch(*third)
    assert torch.equal(pending.finish(), expected)
    layer(*third)


def test_a_failed_context_gives_no_finite_gradient(slots):
    layer = make_experts(slots)
    hidden_states = torch.randn(9, 48, device=DEVICE, requires_grad=True)
    result = layer(hidden_states, *random_routing(9, 8, 3))
    layer._exchange.slots.context[protocol.FAILED.value] = 1  # as an expired wait leaves it, before the host has looked
    result.sum().backward()
    routed = layer.w13.grad.flatten(1).any(dim=1)
    assert not torch.isfinite(hidden_states.grad).any()
    assert routed.any() and not torch.isfinite(layer.w13.grad[routed]).all(dim=(1, 2)).any()


@pytest.mark.parametrize(
    "options",
    [{"keep_received": False}, {"combine": "presummed"}, {"keep_received": False, "combine": "presummed"}],
    ids=str,
)
def test_every_way_of_exchanging_rows_gives_the_same_gradients(slots, options):
    exchange = ff.ExchangeOptions(**options)
    layer = make_experts(slots, exchange=exchange)
    index, weights = random_routing(40, 8, 3)
    index = torch.where(torch.rand(index.shape, device=DEVICE) < 0.2, -1, index)
    check_against_reference(layer, torch.randn(40, 48, device=DEVICE), index, weights)


@pytest.mark.parametrize("hidden", [128, 200])
def test_rows_that_travel_as_fp8_differ_by_its_rounding(slots, hidden):
    layer = make_experts(slots, hidden=hidden, exchange=ff.ExchangeOptions(fp8=True))
    index, weights = random_routing(40, 8, 3)
    hidden_states = torch.randn(40, hidden, device=DEVICE) * torch.logspace(-1, 1, 40, device=DEVICE)[:, None]
    groups = torch.nn.functional.pad(hidden_states, (0, -hidden % 128)).unflatten(1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True) / 448
    rounded = ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(1)[:, :hidden]
    assert 0.005 < relative_error(hidden_states, rounded) < 0.04
    check_against_reference(layer, hidden_states, index, weights, received=rounded)


def test_more_pairs_than_a_layer_takes_are_refused(slots):
    layer = make_experts(slots, exchange=ff.ExchangeOptions(max_pairs=50))
    hidden_states = torch.randn(17, 48, device=DEVICE)
    layer(hidden_states[:16], *random_routing(16, 8, 3))
    with pytest.raises(ff.UsageError, match=r"51 \(token, expert\) pairs and can take 50; raise max_pairs"):
        layer(hidden_states, *random_routing(17, 8, 3))
        slots.synchronize()


def test_shared_output_and_residual_are_added_as_separate_additions_would(memory):
    layer = make_experts(memory, dtype=torch.float16)
    index, weights = random_routing(20, 8, 3)
    hidden, shared, residual = (torch.randn(20, 48, device=DEVICE, dtype=torch.float16) for _ in range(3))
    shared.requires_grad_(), residual.requires_grad_()
    result = layer.dispatch(hidden, index, weights).finish(shared=shared, residual=residual)
    assert torch.equal(result, residual + (layer(hidden, index, weights) + shared))
    gradient = torch.randn_like(result)
    result.backward(gradient)
    assert torch.equal(shared.grad, gradient) and torch.equal(residual.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_are_added_to_main_gradients(memory, dtype):
    layer = make_experts(memory, accumulate_into_main_grad=True, dtype=torch.float16)
    plain = make_experts(memory, dtype=torch.float16)
    plain.load_state_dict(layer.state_dict())
    arguments = (torch.randn(20, 48, device=DEVICE, dtype=torch.float16), *random_routing(20, 8, 3))
    before = {}
    for name, weight in layer.named_parameters():
        weight.main_grad = torch.randn_like(weight, dtype=dtype)
        before[name] = weight.main_grad.clone()
    for each in (layer, plain):
        each(*arguments).sum().backward()
    for name, weight in layer.named_parameters():
        assert weight.grad is None
        added = getattr(plain, name).grad.double() + before[name].double()
        assert_close(weight.main_grad, added, torch.float16)


def test_unaligned_slices_are_ordinary_input(memory):
    layer = make_experts(memory, hidden=50)
    hidden_states, (index, weights) = torch.randn(10, 50, device=DEVICE), random_routing(10, 8, 3)
    whole = layer(hidden_states, index, weights)
    assert torch.equal(layer(hidden_states[1:], index[1:], weights[1:]), whole[1:])


def test_the_whole_layer_routes_as_the_router_says(memory):
    layer = ff.FusedMoE(
        32, 24, 8, 2, ep=memory, max_tokens=32, device=DEVICE,
        scoring="sigmoid", normalize_top_k=True, routed_scaling=2.5, correction_bias=True,
    )  # fmt: skip
    layer.setup()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    hidden_states = torch.randn(4, 5, 32, device=DEVICE, requires_grad=True)
    result = layer(hidden_states)
    gradient = torch.randn_like(result)
    result.backward(gradient)

    parameters = {"weight": layer.gate.weight, "w13": layer.w13, "w2": layer.w2}
    exact = {name: parameter.detach().double().requires_grad_() for name, parameter in parameters.items()}
    flat = hidden_states.detach().double().flatten(0, 1).requires_grad_()
    index, weights = reference.route(
        flat @ exact["weight"].T, 2, sigmoid=True, normalise=True, scaling=2.5, bias=layer.gate.e_score_correction_bias
    )
    expected = reference.experts(flat, index, weights, exact["w13"], exact["w2"])
    expected.backward(gradient.double().flatten(0, 1))
    assert result.shape == hidden_states.shape
    assert_close(result.flatten(0, 1), expected, torch.float32)
    assert_close(hidden_states.grad.flatten(0, 1), flat.grad, torch.float32)
    assert_close(layer.gate.weight.grad, exact["weight"].grad, torch.float32)


def test_one_rank_needs_neither_memory_nor_set_up_nor_a_bound():
    layer = ff.FusedExperts(48, 40, 8, 3, max_tokens=4, device=DEVICE)
    assert layer.size_hint() == {"total": 0}
    index, weights = random_routing(20, 8, 3)
    hidden_states = torch.randn(20, 48, device=DEVICE)
    result = layer(hidden_states, index, weights)
    layer.setup()
    assert layer.ep is None
    assert torch.equal(layer(hidden_states, index, weights), result)
    half = layer.half()(hidden_states.half(), index, weights)
    assert_close(half, result, torch.float16)


@pytest.fixture(scope="module")
def layer():
    return make_experts(ff.init(device=DEVICE), max_tokens=8)


class TestBadInput:
    @pytest.mark.parametrize(
        ("hidden_states", "index", "weights", "error", "sentence"),
        [
            (torch.zeros(4, 47), None, None, ff.UsageError, r"\[4, 47\].*48"),
            (torch.zeros(4, 48, dtype=torch.float64), None, None, TypeError, "float64.*float32"),
            (torch.zeros(9, 48), None, None, ff.UsageError, "9 tokens.*max_tokens is 8"),
            (torch.zeros(4, 48), torch.zeros(4, 2, dtype=torch.long), None, ff.UsageError, r"\[4, 3\]"),
            (torch.zeros(4, 48), torch.zeros(4, 3), None, TypeError, "integers"),
            (torch.zeros(4, 48), None, torch.zeros(4, 3, dtype=torch.long), TypeError, "floating point"),
        ],
    )
    def test_is_named_in_one_sentence(self, layer, hidden_states, index, weights, error, sentence):
        tokens = hidden_states.shape[0]
        index = torch.arange(3).expand(tokens, 3) if index is None else index
        weights = torch.ones(tokens, 3) if weights is None else weights
        with pytest.raises(error, match=sentence):
            layer(hidden_states.to(DEVICE), index.to(DEVICE), weights.to(DEVICE))

    @pytest.mark.parametrize("wrong", [8, -2, 1000])
    def test_expert_ids_out_of_range_are_named(self, slots, wrong):
        layer = make_experts(slots, max_tokens=8)
        index = torch.tensor([[0, 1, wrong]], device=DEVICE)
        with pytest.raises(ff.UsageError, match="from 0 to 7"):
            layer(torch.zeros(1, 48, device=DEVICE), index, torch.ones(1, 3, device=DEVICE))
            layer.ep.synchronize()

    def test_a_layer_cast_after_it_was_made_is_refused(self):
        layer = make_experts(ff.init(device=DEVICE), max_tokens=8).half()
        with pytest.raises(TypeError, match=r"w13 is torch.float16 and the layer was made for torch.float32"):
            layer(torch.zeros(1, 48, device=DEVICE), *random_routing(1, 8, 3))

    def test_weights_in_another_layout_are_refused(self):
        layer = make_experts(ff.init(device=DEVICE), max_tokens=8)
        layer.w2 = torch.nn.Parameter(layer.w2.transpose(1, 2).contiguous().transpose(1, 2))
        with pytest.raises(ff.UsageError, match="w2 must be contiguous"):
            layer(torch.zeros(1, 48, device=DEVICE), *random_routing(1, 8, 3))

    def test_forward_before_setup_is_refused(self):
        layer = ff.FusedExperts(16, 16, 2, 1, ep=ff.init(device=DEVICE), max_tokens=4)
        with pytest.raises(RuntimeError, match=r"call setup\(\)"):
            layer(
                torch.zeros(1, 16, device=DEVICE),
                torch.zeros(1, 1, dtype=torch.long, device=DEVICE),
                torch.ones(1, 1, device=DEVICE),
            )

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "sentence"),
        [
            ((16, 16, 2, 3), {}, ff.UsageError, "top_k is 3 and there are only 2"),
            ((0, 16, 2, 1), {}, ff.UsageError, "hidden_size is 0"),
            ((16.0, 16, 2, 1), {}, TypeError, "hidden_size is 16.0"),
            ((16, 16, 2, 1), {"dtype": torch.float64}, TypeError, "float64"),
            ((16, 16, 2, 1), {"depth": 1}, ff.UsageError, "at least 2"),
            ((16, 16, 2, 1), {"scoring": "tanh"}, ff.UsageError, "softmax"),
            ((16, 16, 6, 1), {"num_groups": 4}, ff.UsageError, "4 groups"),
            ((16, 16, 8, 4), {"num_groups": 4, "top_k_groups": 1}, ff.UsageError, "does not fit"),
        ],
    )
    def test_impossible_layers_are_refused(self, arguments, options, error, sentence):
        with pytest.raises(error, match=sentence):
            ff.FusedMoE(*arguments, max_tokens=4, **options)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_what_backward_needs_is_kept_only_where_gradients_are_recorded(slots, monkeypatch, with_gradients):
    layer, kept = make_experts(slots), []
    up_swiglu = experts.up_swiglu

    def recorded(rows, where, top_k, w13, keep_gate_up, **options):
        kept.append(keep_gate_up)
        return up_swiglu(rows, where, top_k, w13, keep_gate_up, **options)

    monkeypatch.setattr(experts, "up_swiglu", recorded)
    x, ids, weights = torch.randn(4, 48), torch.arange(3, dtype=torch.int32).expand(4, -1), torch.ones(4, 3)
    with torch.set_grad_enabled(with_gradients):
        layer(*(each.to(DEVICE) for each in (x, ids, weights)))
    assert kept == [with_gradients]
