"""The router kernels choose what the plain definition chooses, and their gradient is autograd's."""

import pytest
import torch

from farskip_fused import reference
from farskip_fused.kernels import routing
from tests.kernels.test_layout import TILE_ROWS, check, poisoned  # noqa: F401
from tests.numerics import DEVICE, assert_close

# tokens, experts, top_k, groups, top_groups
SHAPES = [(5, 4, 2, 1, 1), (37, 8, 3, 1, 1), (5, 64, 6, 1, 1), (33, 16, 4, 4, 2), (9, 60, 6, 3, 2), (70, 128, 8, 8, 4)]


def separated(logits, sigmoid, bias):
    """Which rows have no two choices that float32 could mistake for each other."""
    choice = logits.double().sigmoid() if sigmoid else logits.double().softmax(dim=-1)
    choice = choice if bias is None else choice + bias
    return choice.sort(dim=-1).values.diff(dim=-1).amin(dim=-1) > 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["unbiased", "biased"])
def test_matches_the_definition(shape, sigmoid, normalise, with_bias):
    tokens, num_experts, top_k, groups, top_groups = shape
    logits = torch.randn(20 * tokens, num_experts, device=DEVICE)  # a softmax over 128 leaves a third of the rows
    bias = 0.1 * torch.randn(num_experts, device=DEVICE) if with_bias else None
    logits = logits[separated(logits, sigmoid, bias)][:tokens]
    assert len(logits) == tokens
    options = {"sigmoid": sigmoid, "normalise": normalise, "scaling": 2.5, "groups": groups, "top_groups": top_groups}
    experts, weights = routing.route_logits(logits, top_k, bias=bias, **options)

    exact = logits.double().requires_grad_()
    expected_experts, expected_weights = reference.route(exact, top_k, bias=bias, **options)
    assert torch.equal(experts.long(), expected_experts)
    assert_close(weights, expected_weights, torch.float32)

    gradient = torch.randn(tokens, top_k, device=DEVICE)
    expected_weights.backward(gradient.double())
    options = {name: options[name] for name in ("sigmoid", "normalise", "scaling")}
    assert_close(routing.route_backward(logits, experts, gradient, **options), exact.grad, torch.float32)


PLAIN = {"normalise": True, "scaling": 1.0, "groups": 1, "top_groups": 1, "bias": None}


def test_ties_go_to_the_lower_expert():
    experts, _ = routing.route_logits(torch.zeros(3, 8, device=DEVICE), 3, sigmoid=True, **PLAIN)
    assert experts.tolist() == [[0, 1, 2]] * 3


def test_no_tokens_give_no_rows():
    experts, weights = routing.route_logits(torch.empty(0, 8, device=DEVICE), 2, sigmoid=False, **PLAIN)
    assert experts.shape == weights.shape == (0, 2)


@pytest.mark.parametrize("num_experts", [8, 60])
def test_nan_logits_choose_distinct_experts_and_show_in_the_weights(num_experts):
    logits = torch.randn(5, num_experts, device=DEVICE)
    logits[2] = float("nan")
    experts, weights = routing.route_logits(logits, 3, sigmoid=True, **PLAIN)
    assert all(len(set(row)) == 3 and set(row) <= set(range(num_experts)) for row in experts.tolist())
    assert weights[2].isnan().all() and torch.isfinite(weights[[0, 1, 3, 4]]).all()


def test_nan_logits_choose_distinct_experts_of_the_groups_too():
    logits = torch.full((2, 12), float("nan"), device=DEVICE)
    options = {**PLAIN, "groups": 4, "top_groups": 2}
    experts, _ = routing.route_logits(logits, 5, sigmoid=True, **options)
    assert experts.tolist() == [[0, 1, 2, 3, 4]] * 2


# The interpreter loads bfloat16, and multiplies it as float32; a GPU multiplies it as it is.
DTYPES = [
    (torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]  # fmt: skip


# tokens, hidden, experts, top_k, groups, top_groups: few tokens take one program after the product, many take several
# before the sort; depths that are split, or no multiple of a step.
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (0, 64, 8, 2, 1, 1),
        (1, 96, 4, 4, 1, 1),
        (33, 2050, 60, 6, 3, 2),
        (300, 70, 64, 6, 1, 1),
        (700, 130, 40, 3, 4, 2),
    ],
    ids=str,
)
def test_from_hidden_states_to_the_sorted_entries(dtypes, shape):
    tokens, hidden, num_experts, top_k, groups, top_groups = shape
    x = torch.randn(2 * tokens, hidden).to(DEVICE, dtypes[0])
    weight = (torch.randn(num_experts, hidden) / hidden**0.5).to(DEVICE, dtypes[1])
    bias = 0.1 * torch.randn(num_experts, device=DEVICE)
    x = x[separated(x.double() @ weight.double().T, True, bias)][:tokens]
    assert len(x) == tokens
    options = {
        "sigmoid": True, "normalise": True, "scaling": 2.5, "groups": groups, "top_groups": top_groups, "bias": bias
    }  # fmt: skip
    experts, weights, logits, layout = routing.route(x, weight, top_k, **options, tile_rows=TILE_ROWS)
    assert_close(logits, x.double() @ weight.double().T, torch.float32)
    expected_experts, expected_weights = reference.route(logits.double(), top_k, **options)
    assert torch.equal(experts.long(), expected_experts)
    assert_close(weights, expected_weights, torch.float32)
    check(layout, experts.cpu(), num_experts)

    again = routing.route(x, weight, top_k, **options, tile_rows=0)
    assert again[3] is None
    assert all(torch.equal(one, other) for one, other in zip(again[:3], (experts, weights, logits), strict=True))
