"""Chunked losses against the whole logits in float64: values and all gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from farskip_fused.distillation.loss import cross_entropy, kl_divergence
from farskip_fused.distillation.memory import loss_bytes, loss_memory, naive_kl_divergence

TOKENS, HIDDEN, VOCABULARY = 37, 12, 29
CHUNKS = [1, 8, 37, 1000]


def problem(dtype: torch.dtype, bias: bool = True) -> tuple[torch.Tensor, nn.Linear, torch.Tensor, nn.Linear]:
    """Student states and head, teacher states and head; the teacher is wider."""
    torch.manual_seed(3)
    student_head = nn.Linear(HIDDEN, VOCABULARY, bias=bias).to(dtype)
    teacher_head = nn.Linear(HIDDEN + 4, VOCABULARY, bias=bias).to(dtype)
    student = (3 * torch.randn(TOKENS, HIDDEN)).to(dtype).requires_grad_()
    return student, student_head, (3 * torch.randn(TOKENS, HIDDEN + 4)).to(dtype), teacher_head


def gradients(loss: torch.Tensor, hidden: torch.Tensor, head: nn.Linear) -> list[torch.Tensor]:
    inputs = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_kl_equals_the_naive_one_in_float64(chunk, bias):
    hidden, head, teacher_hidden, teacher_head = problem(torch.float64, bias)
    expected = naive_kl_divergence(hidden, head, teacher_hidden, teacher_head)
    actual = kl_divergence(hidden, head, teacher_hidden, teacher_head, chunk)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients(3 * actual, hidden, head), gradients(3 * expected, hidden, head), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_cross_entropy_equals_the_naive_one_in_float64(chunk):
    hidden, head, _, _ = problem(torch.float64)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    expected = F.cross_entropy(head(hidden), targets)
    actual = cross_entropy(hidden, head, targets, chunk)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients(actual, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_kl_in_low_precision_is_near_float64(dtype, tolerance):
    hidden, head, teacher_hidden, teacher_head = problem(dtype)
    wide = hidden.detach().double().requires_grad_()
    wide_heads = [copy.deepcopy(each).double() for each in (head, teacher_head)]
    expected = naive_kl_divergence(wide, wide_heads[0], teacher_hidden.double(), wide_heads[1])
    actual = kl_divergence(hidden, head, teacher_hidden, teacher_head, 8)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=0)
    for ours, theirs in zip(gradients(actual, hidden, head), gradients(expected, wide, wide_heads[0]), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() / theirs.norm() < tolerance


def test_kl_is_zero_where_both_agree_and_positive_elsewhere():
    hidden, head, teacher_hidden, teacher_head = problem(torch.float32)
    same = kl_divergence(hidden, head, hidden.detach(), head, 8)
    assert same.item() == 0
    assert kl_divergence(hidden, head, teacher_hidden, teacher_head, 8).item() > 0.1


def test_the_divergence_is_forward():
    """It punishes a student that rules out what the teacher finds possible, more than one that is undecided."""
    identity = nn.Linear(2, 2, bias=False)
    identity.weight.data = torch.eye(2)
    sure, unsure = torch.tensor([[20.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert kl_divergence(sure, identity, unsure, identity).item() == pytest.approx(9.3069, abs=1e-3)
    assert kl_divergence(unsure, identity, sure, identity).item() == pytest.approx(0.6931, abs=1e-3)


def test_a_frozen_head_gets_no_gradient_and_the_teacher_never_one():
    hidden, head, teacher_hidden, teacher_head = problem(torch.float32)
    head.requires_grad_(False)
    teacher_hidden.requires_grad_()
    kl_divergence(hidden, head, teacher_hidden, teacher_head, 8).backward()
    assert hidden.grad is not None
    assert [each.grad for each in (head.weight, head.bias, teacher_hidden, teacher_head.weight)] == [None] * 4


def test_logits_of_a_chunk_only_exist():
    """The largest tensor that the loss makes has as many rows as a chunk."""
    hidden, head, teacher_hidden, teacher_head = problem(torch.float32)
    rows = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            output = function(*arguments, **(keywords or {}))
            if isinstance(output, torch.Tensor) and output.ndim == 2 and output.shape[1] == VOCABULARY:
                rows.append(output.shape[0])
            return output

    with Recorder():
        kl_divergence(hidden, head, teacher_hidden, teacher_head, 8).backward()
    assert max(rows) <= max(8, HIDDEN + 4)


def test_no_tokens_have_no_loss_and_no_gradient():
    hidden, head, teacher_hidden, teacher_head = problem(torch.float32)
    loss = kl_divergence(hidden[:0], head, teacher_hidden[:0], teacher_head, 8)
    loss.backward()
    assert loss.item() == 0
    assert not head.weight.grad.any()


def test_memory_at_a_vocabulary_of_128k_is_a_fifth_of_the_naive():
    """4096 tokens in bfloat16, hidden size 2048."""
    chunked, naive = (loss_bytes(4096, 2048, 2**17, **each) for each in ({}, {"chunk_size": None}))
    assert chunked <= naive / 5
    # At the least the gradient of the head is there, and log-probabilities of both models.
    assert chunked >= 2048 * 2**17 * 2
    assert naive >= 2 * 4096 * 2**17 * 4


def test_memory_is_said_in_words():
    head = nn.Linear(64, 4096, bias=False)
    sentence = loss_memory(2048, head, 256)
    assert sentence.startswith("The loss of 2,048 tokens takes 0.0")
    assert "with whole logits it would take 0.1" in sentence


@pytest.mark.gpu
def test_memory_is_what_the_gpu_says():
    sizes = 4096, 2048, 2**17
    measured = []
    for chunked in (True, False):
        student, teacher = (torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        heads = [nn.Linear(2048, 2**17, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        heads[1].requires_grad_(False)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        compute = kl_divergence if chunked else naive_kl_divergence
        compute(student.requires_grad_(), heads[0], teacher, heads[1]).backward()
        measured.append(torch.cuda.max_memory_allocated() - before)
    print(f"chunked {measured[0] / 2**30:.2f} GiB, naive {measured[1] / 2**30:.2f} GiB")
    assert measured[0] <= measured[1] / 5
    assert measured[0] == pytest.approx(loss_bytes(*sizes), rel=0.25)
