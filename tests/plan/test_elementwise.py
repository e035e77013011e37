"""The operations that the plan counts, against those that PyTorch runs for the modules of `farskip bench layer`."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from farskip_fused.bench.attention import GroupedSizes, LatentSizes, make_attention
from farskip_fused.bench.layer_ranks import SharedExperts
from farskip_fused.plan import MODELS, Job
from farskip_fused.plan.elementwise import Separate

TOKENS = 64
OPTIONS = {"device": "meta", "dtype": torch.bfloat16}
COUNTED = {"mul", "addcmul", "cat", "sum", "add_", "add", "silu", "silu_backward", "clone"}


class RunByTorch(TorchDispatchMode):
    """Numbers that kernels over strided or broadcast tensors write, or read where they sum; bytes that others move."""

    def __init__(self):
        super().__init__()
        self.totals = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        scales_table = name == "mul" and len(inputs) == 1  # of sines, for one sequence and head only
        if name in COUNTED and not scales_table:
            strided = name == "sum" or not all(each.is_contiguous() for each in inputs)
            strided |= name != "cat" and any(each.numel() != result.numel() for each in inputs)
            sizes = [each.numel() for each in (*inputs, result)]
            moved = {"numbers": max(sizes)} if strided else {"bytes": 2 * sum(sizes)}
            self.totals += Counter(moved, kernels=1)
        return result


class Counted:
    """In the place of a ``Machine``: what its kernels would move is counted and takes no time."""

    def __init__(self):
        self.totals = Counter()

    def strided(self, numbers, kernels=1):
        self.totals += Counter(numbers=numbers, kernels=kernels)
        return 0.0

    def memory(self, moved, kernels=1):
        self.totals += Counter(bytes=moved, kernels=kernels if moved else 0)  # tables of sines have none here either
        return 0.0

    def norm(self, numbers, *, backward=False):
        return 0.0


class NormStandIn(torch.autograd.Function):
    """Takes contiguous tensors in both directions, as the kernels of RMSNorm do, and does nothing else."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.contiguous()

    @staticmethod
    def backward(ctx, gradient):
        ctx.saved_tensors[0].contiguous()
        return gradient


class Norm(torch.nn.Module):
    def forward(self, x):
        return NormStandIn.apply(x)


def counts(run, inputs, count):
    """What PyTorch runs forward and backward, each beside what ``count`` of a machine counts."""
    results = []
    with RunByTorch() as forward:
        outputs = run(*inputs)
    gradients = [torch.empty_like(each) for each in outputs]
    with RunByTorch() as backward:
        torch.autograd.grad(outputs, inputs, gradients)
    for mode, is_backward in ((forward, False), (backward, True)):
        machine = Counted()
        count(machine, is_backward)
        results.append((machine.totals, mode.totals))
    return results


@pytest.mark.parametrize(
    ("name", "sizes"), [("deepseek-v2-lite", LatentSizes()), ("qwen3-30b-a3b", GroupedSizes())], ids=str
)
def test_projections_are_counted_as_torch_runs_them(name, sizes):
    attention = make_attention(2048, sizes, TOKENS, **OPTIONS)
    for norm in ("norm", "query_norm", "key_norm"):
        if hasattr(attention, norm):
            setattr(attention, norm, Norm())
    hidden = torch.empty(TOKENS, 2048, **OPTIONS, requires_grad=True)
    job = Job(MODELS[name], ep=1, sequence=TOKENS, phase="prefill", elementwise="separate")
    found = counts(attention.project, [hidden], lambda machine, backward: Separate(job, machine).projections(backward))
    for counted, run in found:
        assert counted == run


def test_activations_are_counted_as_torch_runs_them():
    hidden = torch.empty(TOKENS, 2048, **OPTIONS, requires_grad=True)
    shared = SharedExperts(2048, 2816, **OPTIONS)
    job = Job("deepseek-v2-lite", ep=1, sequence=TOKENS, phase="prefill", elementwise="separate")
    found = counts(
        lambda x: [shared(x)], [hidden],
        lambda machine, backward: Separate(job, machine).activation(2816, TOKENS, backward),
    )  # fmt: skip
    for counted, run in found:
        assert counted == run
