"""Every expert kernel alone against float32: plain Triton, and Hopper's kernels where the GPU and the sizes allow."""

import pytest
import torch

from farskip_fused.kernels import experts, experts_backward, gather_sum, hopper
from farskip_fused.kernels.layout import local_layout
from farskip_fused.kernels.tiles import choose_tile_rows
from tests.numerics import DEVICE, assert_close

ON_GPU = DEVICE == "cuda"
DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]
# tokens, hidden, intermediate, experts, top_k
SMALL = [(37, 96, 72, 8, 3), (1, 64, 16, 4, 4), (64, 33, 17, 5, 5), (50, 130, 150, 4, 2)]
# On Hopper: ring and tiles wrapped around or not, partial row and column tiles, one tile, many, idle programs.
LARGE = [
    (300, 256, 128, 4, 2), (1000, 512, 192, 8, 3), (700, 320, 704, 16, 4), (257, 64, 64, 1, 1),
    (2048, 2048, 1408, 16, 6), (600, 128, 4096, 4, 2), (4096, 192, 320, 64, 6),
]  # fmt: skip
SHAPES = SMALL + (LARGE if ON_GPU else [])
ROUTINGS = ["uniform", "one expert", "holes"]


def poison_the_allocator(elements):
    """Freed memory full of NaN, so that an element that a kernel does not write shows."""
    for _ in range(4 if ON_GPU else 0):
        torch.full((elements,), float("nan"), device=DEVICE)


class Problem:
    def __init__(self, shape, dtype, routing):
        tokens, hidden, intermediate, num_experts, self.top_k = shape
        index = torch.rand(tokens, num_experts).argsort(dim=-1)[:, : self.top_k]
        if routing == "one expert":
            index = torch.full_like(index, -1)
            index[:, 0] = num_experts // 2
        elif routing == "holes":
            index = torch.where(torch.rand(index.shape) < 0.4, -1, index)
        self.index = index.to(DEVICE, torch.int32)
        self.num_experts = num_experts
        self.layout = local_layout(self.index, num_experts, choose_tile_rows(index.numel(), num_experts, dtype))
        self.count = int((index >= 0).sum())
        self.expert = self.index.flatten()[self.layout.order[: self.count].long()].long()
        self.row = (self.layout.order[: self.count] // self.top_k).long()
        self.x = torch.randn(tokens, hidden, device=DEVICE, dtype=dtype)
        self.gradient = torch.randn(tokens, hidden, device=DEVICE, dtype=dtype)
        self.weights = torch.rand(tokens, self.top_k, device=DEVICE) + 0.1
        self.w13 = (torch.randn(num_experts, 2 * intermediate, hidden, device=DEVICE) / hidden**0.5).to(dtype)
        self.w2 = (torch.randn(num_experts, hidden, intermediate, device=DEVICE) / intermediate**0.5).to(dtype)
        poison_the_allocator(index.numel() * 2 * intermediate + 2 * self.w13.numel())

    def grouped(self, rows, weight):
        """rows [count, D] times each expert's [N, D], in float32."""
        result = torch.empty(self.count, weight.shape[1], device=DEVICE)
        for expert in range(self.num_experts):
            mine = self.expert == expert
            result[mine] = rows[mine].float() @ weight[expert].float().T
        return result

    def outer(self, left, right):
        """Sum over each expert's entries of left [count, M] times right [count, N], in float32."""
        parts = [self.expert == expert for expert in range(self.num_experts)]
        return torch.stack([left[mine].float().T @ right[mine].float() for mine in parts])


@pytest.fixture(params=[(s, d, r) for s in SHAPES for d in DTYPES for r in ROUTINGS], ids=str)
def problem(request):
    torch.backends.cuda.matmul.allow_tf32 = False
    return Problem(*request.param)


def test_forward_kernels_match_float32(problem):
    layout, count, dtype = problem.layout, problem.count, problem.x.dtype
    gate_up, activated = experts.up_swiglu(problem.x, layout, problem.top_k, problem.w13, True)
    assert_close(gate_up[:count], problem.grouped(problem.x[problem.row], problem.w13), dtype)
    gate, up = gate_up[:count].float().chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    assert_close(activated[:count], expected, dtype)
    nothing, again = experts.up_swiglu(problem.x, layout, problem.top_k, problem.w13, False)
    assert nothing is None and torch.equal(again[:count], activated[:count])
    w13 = problem.w13.transpose(1, 2).contiguous()
    for value, usual in zip(
        experts.up_swiglu(problem.x, layout, problem.top_k, w13, True, True), (gate_up, activated), strict=True
    ):
        assert_close(value[:count], usual[:count].float(), dtype)
    if count:
        rows = problem.x.new_zeros(layout.order.shape[0], problem.x.shape[1])
        rows[:count] = problem.x[problem.row]
        _, ordered = experts.up_swiglu(rows, layout, None, problem.w13, False)
        assert_close(ordered[:count], expected, dtype)
    output = experts.project(activated, layout, problem.w2, 1)
    assert_close(output[:count], problem.grouped(activated[:count], problem.w2), dtype)
    summed = gather_sum.sum_entries(output, layout.places, problem.weights)
    weight = problem.weights.flatten()[layout.order[:count].long(), None]
    expected = torch.zeros(problem.x.shape, device=DEVICE).index_add(0, problem.row, output[:count].float() * weight)
    assert_close(summed, expected, dtype)


def test_backward_kernels_match_float32(problem):
    layout, count, dtype = problem.layout, problem.count, problem.x.dtype
    gate_up, _ = experts.up_swiglu(problem.x, layout, problem.top_k, problem.w13, True)
    results = experts_backward.down_gradient_swiglu(problem.gradient, problem.weights, layout, problem.w2, gate_up)
    gradient, weighted, parts = results
    gate, up = gate_up[:count].float().chunk(2, dim=1)
    sigmoid = gate.sigmoid()
    activation = gate * sigmoid * up
    weight = problem.weights.flatten()[layout.order[:count].long(), None]
    through_down = problem.grouped(problem.gradient[problem.row], problem.w2.transpose(1, 2))
    by_gate = through_down * weight * up * sigmoid * (1 + gate * (1 - sigmoid))
    assert_close(gradient[:count], torch.cat([by_gate, through_down * weight * gate * sigmoid], dim=1), dtype)
    assert_close(weighted[:count], activation * weight, dtype)
    assert_close(parts[:count].sum(dim=1), (through_down * activation).sum(dim=1), dtype)
    w2 = problem.w2.transpose(1, 2).contiguous()
    transposed = experts_backward.down_gradient_swiglu(problem.gradient, problem.weights, layout, w2, gate_up, True)
    for value, usual in zip(transposed, results, strict=True):
        assert_close(value[:count], usual[:count].float(), dtype)
    row_gradient = experts.project(gradient, layout, problem.w13, 2)
    assert_close(row_gradient[:count], problem.grouped(gradient[:count], problem.w13.transpose(1, 2)), dtype)

    for left, right, gather_left in ((gradient, problem.x, False), (problem.gradient, weighted, True)):
        expected = problem.outer(
            left[problem.row] if gather_left else left[:count], right[:count] if gather_left else right[problem.row]
        )
        arguments = (left, right, layout, problem.top_k, gather_left)
        assert_close(experts_backward.weight_gradient(*arguments), expected, dtype)
        for main_dtype in (torch.float32, dtype):
            before = torch.randn(expected.shape, device=DEVICE, dtype=main_dtype)
            after = experts_backward.weight_gradient(*arguments, before.clone())
            assert after.dtype == main_dtype
            assert_close(after, before.double() + expected.double(), main_dtype if main_dtype == dtype else dtype)


def test_two_runs_are_bitwise_equal():
    problem = Problem(LARGE[1] if ON_GPU else SMALL[0], DTYPES[0], "uniform")
    results = []
    for _ in range(2):
        poison_the_allocator(1 << 20)
        gate_up, activated = experts.up_swiglu(problem.x, problem.layout, problem.top_k, problem.w13, True)
        gradient, weighted, parts = experts_backward.down_gradient_swiglu(
            problem.gradient, problem.weights, problem.layout, problem.w2, gate_up
        )
        w2_gradient = experts_backward.weight_gradient(problem.gradient, weighted, problem.layout, problem.top_k, True)
        entries = (gate_up, activated, gradient, weighted, parts)
        results.append([tensor[: problem.count] for tensor in entries] + [w2_gradient])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("intermediate", [2304, 2300], ids=["aligned", "unaligned"])  # Hopper's kernels, plain Triton
def test_more_than_two_to_the_31_elements(intermediate):
    problem = Problem((65536, 64, intermediate, 8, 8), torch.bfloat16, "uniform")
    gate_up, _ = experts.up_swiglu(problem.x, problem.layout, problem.top_k, problem.w13, True)
    assert gate_up.numel() > 2**31
    tail = torch.arange(problem.count - 300, problem.count, device=DEVICE)
    expected = problem.x[problem.row[tail]].float() @ problem.w13[problem.expert[tail[0]]].float().T
    mine = problem.expert[tail] == problem.expert[tail[0]]
    assert_close(gate_up[tail][mine], expected[mine], torch.bfloat16)


@pytest.mark.gpu
def test_hopper_takes_what_it_is_made_for():
    if torch.cuda.get_device_capability()[0] != 9 or not hopper.HAS_GLUON:
        pytest.skip("needs a Hopper GPU and Triton 3.6")
    rows = torch.empty(1000, 512, device=DEVICE, dtype=torch.bfloat16)
    assert hopper.usable(rows, 128, 512, 192)
    assert not hopper.usable(rows, 128, 512, 200)
    assert not hopper.usable(rows, 64, 512, 192)
    assert not hopper.usable(rows.float(), 128, 512, 192)
