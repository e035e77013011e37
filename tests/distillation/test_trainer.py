"""FCSD on a model that fits a test: what it learns, what it leaves alone, what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import farskip_fused as ff
from farskip_fused.conversion import connectivity_of, moe_blocks
from farskip_fused.distillation import DistillationConfig, evaluate
from farskip_fused.distillation.blocks import Blocks
from farskip_fused.distillation.optimiser import learning_rate_factor
from farskip_fused.errors import UsageError

SMALL = DistillationConfig(steps=30, batch_tokens=256, micro_batch_tokens=256, learning_rate=5e-3, warmup_steps=3)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_fcsd_brings_a_converted_model_back_to_its_teacher(build, blocks):
    teacher = build()
    model = ff.convert(build())
    before = evaluate(model, blocks, teacher)
    report = ff.distill(model, blocks, SMALL, validation=blocks, evaluations=3)
    after = evaluate(model, blocks, teacher)
    assert after.kl < 0.5 * before.kl
    assert [tokens for tokens, _ in report.evaluations] == [2560, 5120, 7680]
    assert report.evaluations[-1][1].kl == pytest.approx(after.kl, rel=1e-5)  # its own teacher is the model before
    assert (report.steps, report.tokens, len(report.losses)) == (30, 30 * 256, 30)
    assert connectivity_of(model) == [ff.Connectivity.farskip()] * 4
    assert not model.training


def test_the_first_loss_is_the_divergence_from_the_teacher(build, blocks):
    model = ff.convert(build())
    expected = evaluate(model, blocks, build()).kl
    report = ff.distill(model, blocks, SMALL, steps=1, batch_tokens=blocks.numel())
    assert report.losses[0][1] == pytest.approx(expected, rel=1e-5)


def test_sft_learns_the_text_and_pretrains_an_unconverted_model(build, blocks):
    model = build()
    before = evaluate(model, blocks).val_ce
    report = ff.distill(model, blocks, SMALL, objective="sft", validation=blocks)
    assert evaluate(model, blocks).val_ce < 0.7 * before
    assert report.losses[0][1] == pytest.approx(before, rel=0.1)
    assert report.evaluations[-1][1].kl is None


def test_the_objective_decides_what_is_learnt(build, blocks):
    teacher = build()
    results = {}
    for objective in ("kl", "sft"):
        model = ff.convert(build())
        results[objective] = ff.distill(
            model, blocks, SMALL, objective=objective, teacher=teacher, validation=blocks
        ).evaluations[-1][1]
    assert results["kl"].kl < results["sft"].kl
    assert results["sft"].val_ce < results["kl"].val_ce


def test_a_seed_gives_the_same_weights_bit_for_bit_and_another_one_others(build, blocks):
    def train(seed):
        model = ff.convert(build())
        ff.distill(model, blocks, SMALL, steps=3, seed=seed)
        return state(model)

    first, again, other = train(0), train(0), train(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_micro_batches_of_any_size_give_the_same_step(build, blocks):
    def train(micro_batch_tokens):
        model = ff.convert(build().double())
        model.set_experts_implementation("eager")
        losses = ff.distill(
            model, blocks, SMALL, steps=2, batch_tokens=7 * 16, micro_batch_tokens=micro_batch_tokens
        ).losses
        return [loss for _, loss in losses], state(model)

    (whole_losses, whole), (parts_losses, parts) = train(7 * 16), train(3 * 16)
    assert parts_losses == pytest.approx(whole_losses, rel=1e-6)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)


def test_a_given_teacher_is_used_as_it_is_and_not_changed(build, blocks):
    teacher = ff.convert(build(seed=1)).train()
    before = state(teacher)
    model = build()
    divergence = evaluate(model, blocks, teacher).kl
    report = ff.distill(model, blocks, SMALL, teacher=teacher, steps=1, batch_tokens=blocks.numel())
    assert report.losses[0][1] == pytest.approx(divergence, rel=1e-5)
    assert teacher.training
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_frozen_parameters_stay_and_the_routers_biases_too(build, blocks):
    model = ff.convert(build())
    model.get_input_embeddings().requires_grad_(False)
    before = state(model)
    ff.distill(model, blocks, SMALL, steps=3)
    same = {name for name, tensor in model.state_dict().items() if torch.equal(before[name], tensor)}
    assert same == {"model.embed_tokens.weight"} | {name for name in before if "e_score_correction_bias" in name}


def test_balancing_moves_the_biases_against_the_load(build, blocks):
    model = build()
    router = moe_blocks(model)[0][1].gate
    with torch.no_grad():
        router.e_score_correction_bias[:] = torch.tensor([9.0, 9.0, 0.0, 0.0])  # all tokens to the first two experts
    ff.distill(model, blocks, SMALL, objective="sft", steps=2, balance_rate=0.25, validation=blocks)
    assert router.e_score_correction_bias.tolist() == [8.5, 8.5, 0.5, 0.5]
    assert not router._forward_hooks


def test_balancing_needs_biases(blocks):
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, moe_intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with pytest.raises(UsageError, match="no correction bias"):
        ff.distill(transformers.Qwen3MoeForCausalLM(config), blocks, SMALL, objective="sft", balance_rate=0.1)


def test_a_loss_that_stays_not_finite_stops_with_the_weights_of_the_last_step_taken(build, blocks):
    model = ff.convert(build())
    teacher = build(seed=1)
    with torch.no_grad():
        teacher.lm_head.weight[3, 3] = math.inf
    before = state(model)
    with pytest.raises(FloatingPointError, match="3 steps in a row up to 3 of 30 were skipped, the last with loss nan"):
        ff.distill(model, blocks, SMALL, teacher=teacher, most_skipped=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_first_step_is_adamw_of_the_clipped_gradient(build, blocks):
    """Against the naive loss, torch's clipping and AdamW without decay on vectors."""
    model = build()
    reference = copy.deepcopy(model)
    logits = reference(blocks).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    for parameter in reference.parameters():
        decay = 0.3 if parameter.ndim > 1 else 0.0
        torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.95), weight_decay=decay).step()
    ff.distill(
        model, blocks, objective="sft", steps=1, batch_tokens=blocks.numel(), micro_batch_tokens=blocks.numel(),
        learning_rate=1e-3, warmup_steps=0, weight_decay=0.3, gradient_clip=0.01,
    )  # fmt: skip
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        # AdamW's first step is the sign of the gradient: where that is near 0, rounding decides.
        clear = theirs.grad.abs() > 1e-7
        torch.testing.assert_close(ours[clear], theirs[clear], rtol=1e-4, atol=1e-6, msg=name)


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    factors = [learning_rate_factor(step, 101, 20, 0.1) for step in range(101)]
    assert factors[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert factors[20] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert learning_rate_factor(0, 1, 0, 0.1) == 1.0


def test_without_steps_the_data_are_seen_once(build, blocks):
    report = ff.distill(build(), blocks, SMALL, objective="sft", steps=None)
    assert report.tokens == blocks.numel()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"objective": "dpo"}, "Unknown objective 'dpo'"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"batch_tokens": 15}, "A batch of 15 tokens"),
        ({"batch_tokens": 10**6}, "A batch of 1000000 tokens"),
        ({"learning_rte": 1e-3}, "Unknown option learning_rte"),
    ],
)
def test_bad_options_are_refused_before_training(build, blocks, options, part):
    model = ff.convert(build())
    before = state(model)
    with pytest.raises(UsageError, match=part):
        ff.distill(model, blocks, **({"steps": 2, "batch_tokens": 256} | options))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_models_that_cannot_be_their_own_teacher_are_refused(build, blocks):
    model = build()
    with pytest.raises(UsageError, match="standard connectivity"):
        ff.distill(model, blocks, SMALL)
    with pytest.raises(UsageError, match="is the model itself"):
        ff.distill(model, blocks, SMALL, teacher=model)
    with pytest.raises(UsageError, match="No parameter"):
        ff.distill(ff.convert(build()).requires_grad_(False), blocks, SMALL)
    with pytest.raises(UsageError, match="is in float16, in which small gradients vanish; load it in bfloat16"):
        ff.distill(ff.convert(build()).half(), blocks, SMALL)


@pytest.mark.parametrize(
    ("held_out", "part"),
    [
        (Blocks(torch.ones(2, 16, dtype=torch.int64), counted=torch.zeros(2, 16, dtype=torch.bool)), "no token counts"),
        (torch.full((2, 16), 64), "token ids 64 to 64"),
    ],
)
def test_validation_data_are_checked_before_training(build, blocks, held_out, part):
    model = ff.convert(build())
    before = state(model)
    with pytest.raises(UsageError, match=part):
        ff.distill(model, blocks, SMALL, validation=held_out)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
