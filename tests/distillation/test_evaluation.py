"""Evaluation against the whole logits, and its doors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import farskip_fused as ff
from farskip_fused.distillation import evaluate, unigram_cross_entropy
from farskip_fused.errors import UsageError


def test_evaluation_equals_the_naive_one(build, blocks):
    teacher = build()
    model = ff.convert(build())
    with torch.no_grad():
        log_p, log_q = (
            F.log_softmax(each(blocks).logits[:, :-1].double(), -1).flatten(0, 1) for each in (model, teacher)
        )
    evaluation = evaluate(model, blocks, teacher, batch_tokens=80, chunk_size=17)
    assert evaluation.val_ce == pytest.approx(F.nll_loss(log_p, blocks[:, 1:].flatten()).item(), rel=1e-5)
    assert evaluation.kl == pytest.approx(
        F.kl_div(log_p, log_q, log_target=True, reduction="batchmean").item(), rel=1e-4
    )
    assert evaluation.agreement == pytest.approx(
        (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item(), abs=2e-3
    )
    assert evaluation.kl > 0.01


def test_a_model_agrees_with_itself(build, blocks):
    evaluation = evaluate(build(), blocks, build())
    assert (evaluation.kl, evaluation.agreement) == (0.0, 1.0)


def test_without_a_teacher_there_is_cross_entropy_alone(build, blocks):
    evaluation = evaluate(build(), blocks)
    assert evaluation.to_dict().keys() == {"val_ce"}


def test_evaluation_leaves_the_models_as_they_were(build, blocks):
    model, teacher = build().train(), build()
    evaluate(model, blocks, teacher)
    assert model.training
    assert not teacher.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_unigram_counts_the_training_tokens():
    training, validation = torch.tensor([[0, 0, 1]]), torch.tensor([[2, 0, 2]])
    # Counts plus one: 3, 2, 1, 1 of 7; the first token of a block is not predicted.
    assert unigram_cross_entropy(training, validation, 4) == pytest.approx(-(math.log(3 / 7) + math.log(1 / 7)) / 2)


def test_ids_and_blocks_that_the_model_does_not_know_are_refused(build):
    with pytest.raises(UsageError, match="token ids 0 to 64, the model knows 0 to 63"):
        evaluate(build(), torch.tensor([[0, 64]]))
    with pytest.raises(UsageError, match="longer than the model's 64"):
        evaluate(build(), torch.zeros(1, 65, dtype=torch.int64))


def test_a_teacher_of_another_vocabulary_is_refused(build, blocks):
    with pytest.raises(UsageError, match="teacher has a vocabulary of 80, the model one of 64"):
        evaluate(build(), blocks, build(vocab_size=80))


def test_a_model_that_scales_its_logits_is_refused(build, blocks):
    model = build()
    model.register_forward_hook(lambda _module, _inputs, output: setattr(output, "logits", output.logits * 2))
    with pytest.raises(UsageError, match="changes its logits"):
        evaluate(model, blocks)


def test_a_model_without_a_head_is_refused(build, blocks):
    model = build()
    model.lm_head = nn.Identity()
    with pytest.raises(UsageError, match="no linear output head"):
        evaluate(model, blocks)
