"""The experts of one rank as operators: float64 numbers, what is saved, torch.compile, accumulation, bad input."""

import pytest
import torch

import farskip_fused as ff
from farskip_fused import local_experts, reference
from farskip_fused.local_experts import LocalPending, sort_entries
from tests.numerics import DEVICE, assert_close

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 20, 48, 40, 8, 3


def random_call(
    tokens=TOKENS, dtype=torch.float32, transposed=False, hidden=HIDDEN, intermediate=INTERMEDIATE, num_experts=EXPERTS
):
    """Arguments of fused_experts; every floating-point one needs a gradient."""
    options = {"device": DEVICE, "dtype": dtype}
    w13 = torch.randn(num_experts, 2 * intermediate, hidden, **options) / hidden**0.5
    w2 = torch.randn(num_experts, hidden, intermediate, **options) / intermediate**0.5
    if transposed:
        w13, w2 = w13.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    hidden_states = torch.randn(tokens, hidden, **options)
    weights = torch.rand(tokens, TOP_K, device=DEVICE) + 0.1
    index = torch.rand(tokens, num_experts, device=DEVICE).argsort(dim=-1)[:, :TOP_K]
    floating = [tensor.requires_grad_() for tensor in (hidden_states, weights, w13, w2)]
    return floating[0], index, *floating[1:]


def start(hidden_states, index, weights, w13, w2):
    return LocalPending(hidden_states, sort_entries(hidden_states, index, w13), weights, w13, w2)


def gradients(result, arguments, gradient):
    return torch.autograd.grad(result, [tensor for tensor in arguments if tensor.requires_grad], gradient)


def expected_of(arguments, gradient, transposed=False):
    """Result and gradients in float64."""
    hidden_states, index, weights, w13, w2 = arguments
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_states, weights, w13, w2)]
    w13, w2 = (weight.transpose(1, 2) if transposed else weight for weight in exact[2:])
    result = reference.experts(exact[0], index, exact[1], w13, w2)
    return result, torch.autograd.grad(result, exact, gradient.double())


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_and_gradients_match_float64(dtype, transposed):
    arguments = random_call(70, dtype, transposed, hidden=130, intermediate=150)
    result = ff.fused_experts(*arguments, transposed=transposed)
    gradient = torch.randn_like(result)
    expected, expected_gradients = expected_of(arguments, gradient, transposed)
    assert_close(result, expected, dtype)
    for value, exact in zip(gradients(result, arguments, gradient), expected_gradients, strict=True):
        assert_close(value, exact, dtype)


def test_unrouted_entries_and_repeated_experts_are_ordinary():
    hidden_states, index, *rest = random_call()
    index[::2, 1] = -1
    index[3] = -1
    index[4] = index[4, 0]
    arguments = hidden_states, index, *rest
    result = ff.fused_experts(*arguments)
    gradient = torch.randn_like(result)
    expected, expected_gradients = expected_of(arguments, gradient)
    assert_close(result, expected, torch.float32)
    assert not result[3].any()
    for value, exact in zip(gradients(result, arguments, gradient), expected_gradients, strict=True):
        assert_close(value, exact, torch.float32)


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_experts_of_other_ranks_add_nothing_where_a_map_says_which_are_here(tokens, monkeypatch):
    asked = []
    choose = local_experts.tuning.choose
    monkeypatch.setattr(
        local_experts.tuning, "choose", lambda entries, *rest: asked.append(entries) or choose(entries, *rest)
    )
    hidden_states, index, weights, w13, w2 = (tensor.detach() for tensor in random_call(tokens))
    expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32, device=DEVICE)
    here = torch.randperm(EXPERTS, device=DEVICE)[: EXPERTS // 2]
    expert_map[here] = torch.arange(len(here), dtype=torch.int32, device=DEVICE)
    result = torch.full_like(hidden_states, float("nan"))
    local_experts.compute_experts(hidden_states, index, weights, w13[here], w2[here], result, expert_map)
    exact = (tensor.double() for tensor in (weights, w13[here], w2[here]))
    expected = reference.experts(hidden_states.double(), expert_map[index], *exact)
    assert_close(result, expected, torch.float32)
    assert asked == 2 * [tokens * TOP_K // 2]  # for the layout and for the GEMMs, what is here on average


def test_any_integers_and_any_floating_point_weights_will_do():
    hidden_states, index, weights, w13, w2 = random_call()
    weights = weights.detach().half()
    expected = ff.fused_experts(hidden_states, index, weights.float(), w13, w2)
    assert torch.equal(ff.fused_experts(hidden_states, index.int(), weights, w13, w2), expected)
    assert torch.equal(ff.fused_experts(hidden_states, index.to(torch.uint8), weights, w13, w2), expected)


@pytest.mark.parametrize("tokens", [0, 1, TOKENS], ids=["none", "unsorted", "sorted"])
def test_without_operators_the_bits_are_the_same(tokens):
    arguments = [tensor.detach() for tensor in random_call(tokens)]
    arguments[1][:, 1] = -1
    result = torch.full_like(arguments[0], torch.nan)
    with torch.no_grad():
        local_experts.compute_experts(*arguments, result)
        assert torch.equal(result, ff.fused_experts(*arguments))


def test_unaligned_and_strided_activations_are_ordinary():
    hidden_states, index, weights, w13, w2 = (tensor.detach() for tensor in random_call(hidden=50))
    whole = ff.fused_experts(hidden_states, index, weights, w13, w2)
    assert torch.equal(ff.fused_experts(hidden_states[1:], index[1:], weights[1:], w13, w2), whole[1:])
    wide = torch.cat([hidden_states, hidden_states], dim=1)[:, :50]
    assert torch.equal(ff.fused_experts(wide, index, weights, w13, w2), whole)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize(("tokens", "num_experts"), [(1, 8), (2, 32), (8, 96)])
def test_few_entries_are_not_sorted_without_a_backward_pass(tokens, num_experts, transposed, launched):
    hidden_states, _, weights, w13, w2 = random_call(tokens, torch.float16, transposed, num_experts=num_experts)
    index = torch.randint(num_experts, (tokens, TOP_K), device=DEVICE)  # an expert may come twice
    index[0, 1] = -1
    arguments = hidden_states, index, weights, w13, w2
    with torch.no_grad():
        result = ff.fused_experts(*arguments, transposed=transposed)
        assert torch.equal(
            ff.fused_experts(hidden_states, index.to(torch.int16), *arguments[2:], transposed=transposed), result
        )
    assert launched[:3] == ["_up_swiglu", "_project", "_sum_entries"] == launched[3:]
    assert_close(result, expected_of(arguments, torch.ones_like(result), transposed)[0], torch.float16)
    launched.clear()
    assert_close(ff.fused_experts(*arguments, transposed=transposed), result.float(), torch.float16)
    assert launched == ["_sort", "_up_swiglu", "_project", "_sum_entries"]


def test_entries_that_may_share_an_expert_are_sorted(launched):
    with torch.no_grad():
        ff.fused_experts(*random_call(2))
        ff.fused_experts(*random_call(0))
    assert launched == 2 * ["_sort", "_up_swiglu", "_project", "_sum_entries"]


@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_a_layer_with_its_router_takes_five_launches_for_few_tokens(tokens, launched):
    layer = ff.FusedMoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, max_tokens=TOKENS, device=DEVICE)
    hidden_states = torch.randn(tokens, HIDDEN, device=DEVICE)
    with torch.no_grad():
        result = layer(hidden_states)
    assert launched == ["_gate", "_route", "_up_swiglu", "_project", "_sum_entries"]
    assert_close(result, layer(hidden_states), torch.float32)


def saved_bytes(function):
    """Result, and bytes of the tensors that autograd keeps for its backward, parameters aside."""
    saved = {}

    def pack(tensor):
        if not tensor.is_leaf or not tensor.requires_grad or tensor.dim() < 3:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, sum(saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_saved_are_inputs_and_pre_activations_and_nothing_of_every_expert_output(dtype):
    tokens, hidden, intermediate = 256, 128, 16
    arguments = random_call(tokens, dtype, False, hidden, intermediate)
    result, saved = saved_bytes(lambda: ff.fused_experts(*arguments))
    large = dtype.itemsize * (tokens * hidden + tokens * TOP_K * 2 * intermediate)
    indices = tokens * TOP_K * 4 * 3 + (EXPERTS + 1) * 4 + 4  # router weights, order, places; offsets, tile count
    row_tiles = saved - large - indices
    assert 0 <= row_tiles <= 16 * (tokens * TOP_K // 16 + EXPERTS)
    result.sum().backward()


def test_without_gradients_nothing_is_kept():
    arguments = random_call()
    with torch.no_grad():
        result, saved = saved_bytes(lambda: start(*arguments).finish())
    assert not result.requires_grad and saved == 0
    frozen = [tensor.detach() for tensor in arguments]
    result, saved = saved_bytes(lambda: ff.fused_experts(*frozen))
    assert not result.requires_grad and saved == 0
    assert start(*frozen[:3], arguments[3], frozen[4]).finish().requires_grad
    with torch.no_grad():
        pending = start(*arguments)
    assert not pending.finish().requires_grad


@pytest.mark.parametrize("kept", range(4))
def test_only_the_gradients_that_are_needed_are_computed(kept, monkeypatch):
    arguments = random_call()
    floating = [arguments[position] for position in (0, 2, 3, 4)]
    gradient = torch.randn(TOKENS, HIDDEN, device=DEVICE)
    expected = torch.autograd.grad(ff.fused_experts(*arguments), floating, gradient)[kept]
    launched = []
    for module, name in (
        (local_experts.experts, "project"),
        (local_experts.gather_sum, "sum_parts"),
        (local_experts.experts_backward, "weight_gradient"),
    ):
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _name=name, _launch=launch: launched.append(_name) or _launch(*a))
    for position, tensor in enumerate(floating):
        tensor.requires_grad_(position == kept)
    result = ff.fused_experts(*arguments)
    launched.clear()
    assert torch.equal(torch.autograd.grad(result, floating[kept], gradient)[0], expected)
    assert launched == [("project", "sum_parts", "weight_gradient", "weight_gradient")[kept]]


def test_the_operators_keep_the_contract_of_torch_library():
    hidden_states, index, weights, w13, w2 = random_call()
    # What lies past the last entry is undefined, so the layout is not compared between two runs.
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(local_experts._expert_layout, (index, EXPERTS, 32), test_utils=kinds)
    where = sort_entries(hidden_states, index, w13)
    plain = [tensor.detach() for tensor in (hidden_states, w13, w2)]
    torch.library.opcheck(local_experts._expert_outputs, (*plain, *where, False, False), test_utils=kinds)
    torch.library.opcheck(local_experts._expert_outputs, (*plain, *where, False, True))
    values, gate_up = local_experts._expert_outputs(*plain, *where, False, True)
    saved = (hidden_states, weights, w13, w2, gate_up, *where, False)
    torch.library.opcheck(local_experts._sum_experts, (values, *saved, None, None))
    saved = tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in saved)
    arguments = (torch.randn_like(plain[0]), *saved, [True, False, True, True])
    torch.library.opcheck(local_experts._expert_gradients, arguments, test_utils=kinds)
    main_grads = (torch.zeros_like(plain[1]), torch.zeros_like(plain[2]))
    torch.library.opcheck(local_experts._expert_gradients_into, (*arguments, *main_grads))


def test_the_operators_keep_their_contract_for_transposed_weights():
    hidden_states, index, weights, w13, w2 = random_call(transposed=True)
    where = sort_entries(hidden_states, index, w13)
    plain = [tensor.detach() for tensor in (hidden_states, w13, w2)]
    values, gate_up = local_experts._expert_outputs(*plain, *where, True, True)
    torch.library.opcheck(
        local_experts._sum_experts, (values, hidden_states, weights, w13, w2, gate_up, *where, True, None, None)
    )


def test_torch_compile_takes_it_whole_for_any_number_of_tokens():
    def function(*arguments):
        return 2.0 * ff.fused_experts(*arguments)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (20, 7, 64):
        arguments = random_call(tokens)
        gradient = torch.randn(tokens, HIDDEN, device=DEVICE)
        result, expected = compiled(*arguments), function(*arguments)
        assert torch.equal(result, expected)
        for value, eager in zip(
            gradients(result, arguments, gradient), gradients(expected, arguments, gradient), strict=True
        ):
            assert torch.equal(value, eager)
        with torch.no_grad():
            assert torch.equal(compiled(*arguments), expected)
    with torch.no_grad():
        arguments = random_call(1)
        assert torch.equal(compiled(*arguments), function(*arguments))


def test_torch_compile_takes_router_and_experts_whole():
    layer = ff.FusedMoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, max_tokens=TOKENS, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    hidden_states = torch.randn(2, 9, HIDDEN, device=DEVICE, requires_grad=True)
    inputs = (hidden_states, *layer.parameters())
    result, expected = compiled(hidden_states), layer(hidden_states)
    assert torch.equal(result, expected)
    gradient = torch.randn_like(result)
    for value, eager in zip(
        torch.autograd.grad(result, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        assert torch.equal(value, eager)


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs():
    hidden_states, index, weights, w13, w2 = (tensor.detach() for tensor in random_call(dtype=torch.bfloat16))
    ff.fused_experts(hidden_states, index, weights, w13, w2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ff.fused_experts(hidden_states, index, weights, w13, w2)
    for _ in range(3):
        other, other_index, other_weights, _, _ = (tensor.detach() for tensor in random_call(dtype=torch.bfloat16))
        hidden_states.copy_(other), index.copy_(other_index), weights.copy_(other_weights)
        graph.replay()
        assert torch.equal(result, ff.fused_experts(other, other_index, other_weights, w13, w2))


@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("wrong", [EXPERTS, -2, 2**33])
def test_expert_ids_out_of_range_give_nan_where_nobody_looks_at_them(wrong, tokens, monkeypatch):
    monkeypatch.setattr(local_experts, "check_ids", lambda *_: None)  # as on a GPU
    arguments = random_call(tokens)
    whole = ff.fused_experts(*arguments)
    arguments[1][0, 1] = wrong
    result = ff.fused_experts(*arguments)
    assert result[0].isnan().all() and torch.equal(result[1:], whole[1:])
    hidden_gradient, weights_gradient, *weight_gradients = gradients(result, arguments, torch.ones_like(result))
    assert hidden_gradient[0].isnan().all() and weights_gradient[0].isnan().tolist() == [False, True, False]
    assert torch.isfinite(hidden_gradient[1:]).all() and torch.isfinite(weights_gradient[1:]).all()
    assert all(torch.isfinite(gradient).all() for gradient in weight_gradients)
    with torch.no_grad():
        assert ff.fused_experts(*arguments)[0].isnan().all()


class TestPending:
    def test_steps_equal_one_call_in_any_order(self):
        calls = [random_call(), random_call(9)]
        whole = [ff.fused_experts(*arguments) for arguments in calls]
        first, second = (start(*arguments) for arguments in calls)
        second.experts()
        first.experts()
        assert torch.equal(first.finish(), whole[0])
        assert torch.equal(second.finish(), whole[1])

    def test_a_step_taken_twice_is_refused(self):
        pending = start(*random_call())
        pending.experts()
        with pytest.raises(RuntimeError, match=r"experts\(\) was called twice"):
            pending.experts()
        pending.finish()
        with pytest.raises(RuntimeError, match=r"finish\(\) was called twice"):
            pending.finish()
        with pytest.raises(RuntimeError, match=r"experts\(\) was called twice"):
            pending.experts()


class TestMainGrad:
    def layer(self, **options):
        layer = ff.FusedExperts(
            HIDDEN, INTERMEDIATE, EXPERTS, TOP_K,
            max_tokens=TOKENS, device=DEVICE, accumulate_into_main_grad=True, **options,
        )  # fmt: skip
        with torch.no_grad():
            for weight in layer.parameters():
                weight.normal_(std=0.2)
        return layer

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_gradients_of_micro_batches_are_added_to_it(self, main_dtype, compiled):
        layer = self.layer()
        before = {}
        for name, weight in layer.named_parameters():
            weight.main_grad = torch.randn(weight.shape, device=DEVICE, dtype=main_dtype)
            before[name] = weight.main_grad.clone()
        run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        calls = [random_call()[:3] for _ in range(2)]
        results = []
        for arguments in calls:
            results.append(run(*arguments))
            if compiled:
                results[-1].sum().backward()
        if not compiled:  # both forward passes come first, as in a pipeline
            for result in results:
                result.sum().backward()
        layer.accumulate_into_main_grad = False
        for arguments, result in zip(calls, results, strict=True):
            accumulated = arguments[0].grad, arguments[2].grad
            arguments[0].grad = arguments[2].grad = None
            again = layer(*arguments)
            again.sum().backward()
            assert torch.equal(again, result)
            assert torch.equal(arguments[0].grad, accumulated[0]) and torch.equal(arguments[2].grad, accumulated[1])
        for name, weight in layer.named_parameters():
            added = weight.main_grad.double() - before[name].double()
            error = (added - weight.grad.double()).abs().max()
            # Rounded to the buffer's dtype after each micro-batch.
            assert error <= 2 * torch.finfo(main_dtype).eps * weight.main_grad.abs().max() + 1e-5

    def test_the_usual_gradient_stays_as_it_is(self):
        layer = self.layer()
        layer.w13.main_grad = torch.zeros_like(layer.w13)
        layer.w2.requires_grad_(False)
        layer(*random_call()[:3]).sum().backward()
        assert layer.w13.main_grad.any()
        assert layer.w13.grad is None and layer.w2.grad is None

    def test_a_missing_or_wrong_buffer_is_named(self):
        layer = self.layer()
        arguments = random_call()[:3]
        with pytest.raises(ff.UsageError, match=r"w13\.main_grad is missing"):
            layer(*arguments)
        layer.w13.main_grad = torch.zeros(2, 2)
        with pytest.raises(ff.UsageError, match=r"w13\.main_grad is of shape \[2, 2\]"):
            layer(*arguments)
        layer.w13.main_grad = torch.zeros_like(layer.w13, dtype=torch.int32)
        with pytest.raises(ff.UsageError, match="contiguous and floating point"):
            layer(*arguments)


def change(arguments, position, function):
    changed = [tensor.detach() for tensor in arguments]
    changed[position] = function(changed[position])
    return changed


class TestBadInput:
    @pytest.mark.parametrize(
        ("position", "function", "error", "sentence"),
        [
            (0, lambda x: x[:, :47], ff.UsageError, r"Hidden states \[20, 47\].*\[tokens, 48\]"),
            (0, lambda x: x[None], ff.UsageError, r"\[1, 20, 48\]"),
            (0, lambda x: x.half(), TypeError, "float16.*float32"),
            (1, lambda x: x[:, 0], ff.UsageError, r"ids \[20\].*both must be \[20, top_k\]"),
            (1, lambda x: x[:, :2], ff.UsageError, r"\[20, 2\] and weights \[20, 3\]"),
            (1, lambda x: x.float(), TypeError, "ids must be integers"),
            (2, lambda x: x[1:], ff.UsageError, r"weights \[19, 3\]"),
            (2, lambda x: x.long(), TypeError, "weights floating point"),
            (3, lambda x: x[:7], ff.UsageError, r"must be \[E, 2I, H\] and \[E, H, I\]"),
            (3, lambda x: x[0], ff.UsageError, r"w13 \[80, 48\]"),
            (3, lambda x: x.half(), TypeError, "both must be bfloat16, float16 or float32"),
            (3, lambda x: x.flip(1).mT.contiguous().mT, ff.UsageError, "w13 must be contiguous"),
            (4, lambda x: x[:, :47], ff.UsageError, r"w2 \[8, 47, 40\]"),
        ],
    )
    def test_is_named_in_one_sentence(self, position, function, error, sentence):
        with pytest.raises(error, match=sentence):
            ff.fused_experts(*change(random_call(), position, function))

    def test_transposed_weights_that_are_not_are_named(self):
        with pytest.raises(ff.UsageError, match=r"must be \[E, H, 2I\] and \[E, I, H\]"):
            ff.fused_experts(*random_call(), transposed=True)

    @pytest.mark.skipif(DEVICE != "cpu", reason="looking at ids on a GPU would wait for it")
    @pytest.mark.parametrize("wrong", [8, -2, 2**33])
    def test_expert_ids_out_of_range_are_named(self, wrong):
        with pytest.raises(ff.UsageError, match="from 0 to 7"):
            ff.fused_experts(*change(random_call(), 1, lambda x: x.index_fill(0, torch.tensor([3]), wrong)))
        with torch.no_grad(), pytest.raises(ff.UsageError, match="from 0 to 7"):
            ff.fused_experts(*change(random_call(1), 1, lambda x: x.fill_(wrong)))
