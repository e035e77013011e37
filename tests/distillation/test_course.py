"""The course of a training: what is logged, resumed, skipped, stopped, swept, and in which precision."""

from __future__ import annotations

import json
import math

import pytest
import torch

import farskip_fused as ff
from farskip_fused.distillation import PRESETS, DistillationConfig, evaluate
from farskip_fused.distillation.early_stopping import EarlyStopping
from farskip_fused.distillation.guard import ENOUGH, Guard
from farskip_fused.distillation.optimiser import Optimiser
from farskip_fused.distillation.sweep import sweep
from farskip_fused.errors import UsageError

SMALL = DistillationConfig(steps=8, batch_tokens=64, micro_batch_tokens=32, learning_rate=5e-3, warmup_steps=2)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


class Stopped(Exception):
    """What ends a training from outside."""


def stop_at(look):
    """A metric that ends the training at its look of that number."""
    looks = iter(range(look))

    def metric(model):
        if next(looks, None) is None:
            raise Stopped
        return model.lm_head.weight.double().sum().item()

    return metric


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.bfloat16])
def test_a_resumed_training_ends_bit_for_bit_as_one_that_was_not_interrupted(build, blocks, tmp_path, dtype):
    options = {"metric_every": 1, "validation": blocks[:8], "evaluations": 4, "balance_rate": 0.01}
    straight = ff.convert(build().to(dtype))
    expected = ff.distill(straight, blocks, SMALL, metric=stop_at(9), **options)
    broken = ff.convert(build().to(dtype))
    keeping = {"folder": tmp_path, "checkpoint_every": 2}
    with pytest.raises(Stopped):
        ff.distill(broken, blocks, SMALL, metric=stop_at(5), **keeping, **options)
    torch.manual_seed(99)  # a new process has other generators
    resumed = ff.convert(build().to(dtype))
    found = ff.distill(resumed, blocks, SMALL, metric=stop_at(9), resume=True, **keeping, **options)
    assert same(state(straight), state(resumed))
    assert found.losses == expected.losses
    assert found.evaluations == expected.evaluations
    assert found.metrics == expected.metrics
    assert found.best_tokens == expected.best_tokens
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 9))
    assert steps == sorted(steps)
    assert sorted(each.name for each in tmp_path.glob("step-*")) == ["step-00000006", "step-00000008"]


def test_a_state_of_another_training_is_refused(build, blocks, tmp_path):
    keeping = {"folder": tmp_path, "checkpoint_every": 1, "steps": 2}
    ff.distill(ff.convert(build()), blocks, SMALL, **keeping)
    with pytest.raises(UsageError, match="resume it, or name another folder"):
        ff.distill(ff.convert(build()), blocks, SMALL, **keeping)
    for model, changed in ((build(), {"seed": 1}), (build(seed=1), {})):
        with pytest.raises(UsageError, match="another model, data, configuration"):
            ff.distill(ff.convert(model), blocks, SMALL, resume=True, **keeping | changed)
    with pytest.raises(UsageError, match="give the folder"):
        ff.distill(ff.convert(build()), blocks, SMALL, resume=True)
    with pytest.raises(UsageError, match="checkpoint_every is 2; it must be at least 1, with a folder"):
        ff.distill(ff.convert(build()), blocks, SMALL, checkpoint_every=2)


def test_the_log_has_a_line_for_every_step_and_evaluation(build, blocks, tmp_path):
    report = ff.distill(ff.convert(build()), blocks, SMALL, validation=blocks, evaluations=2, folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [(line["tokens"], line["loss"]) for line in steps] == report.losses
    assert steps[0].keys() >= {"gradient_norm", "learning_rate", "tokens_per_second"}
    assert steps[0]["learning_rate"] == SMALL.learning_rate / 2
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert [(line["tokens"], line["kl"]) for line in evaluations] == [(t, e.kl) for t, e in report.evaluations]


def test_tensorboard_gets_the_same_numbers(build, blocks, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = ff.distill(ff.convert(build()), blocks, SMALL, steps=2, folder=tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("step/loss")
    assert [event.step for event in events] == [1, 2]
    assert [event.value for event in events] == pytest.approx([loss for _, loss in report.losses])


def test_16_bit_weights_are_trained_through_32_bits(build, blocks):
    """Steps far below the rounding of bfloat16 add up."""
    options = {"learning_rate": 1e-5, "weight_decay": 0.0, "warmup_steps": 0, "final_learning_rate": 1.0}
    changed = []
    for steps in (1, 30):
        model = build().bfloat16()
        before = state(model)
        ff.distill(model, blocks, SMALL, objective="sft", steps=steps, micro_batch_tokens=64, **options)
        assert model.dtype == torch.bfloat16
        changed.append(sum(int((before[name] != tensor).sum()) for name, tensor in model.state_dict().items()))
    assert changed[1] > 3 * changed[0] > 0


def test_gradients_of_16_bit_weights_add_up_in_32_bits(build):
    model = build().bfloat16()
    optimiser = Optimiser(model, SMALL, 1)
    weight = model.lm_head.weight
    for _ in range(3):
        (weight.float().sum() * 1.0078125).backward()
    master = next(each.master for each in optimiser.trained if each.parameter is weight)
    assert weight.grad is None
    assert master.grad.dtype == torch.float32
    assert torch.equal(master.grad, torch.full_like(master.grad, 3.0234375))
    optimiser.close()
    weight.float().sum().backward()
    assert weight.grad is not None


def test_l2_pulls_the_layers_to_the_teachers(build, blocks):
    def distance(model):
        states = {}
        for name, each in (("teacher", build()), ("model", model)):
            with torch.no_grad():
                states[name] = each(blocks[:16], output_hidden_states=True).hidden_states[1:-1]
        pairs = zip(states["model"], states["teacher"], strict=True)
        return sum(((a - b).square().sum() / b.square().sum()).item() for a, b in pairs) / 3

    options = {"batch_tokens": 256, "micro_batch_tokens": 256, "l2_weight": 3.0}
    first = ff.distill(ff.convert(build()), blocks[:16], SMALL, objective="kl+l2", steps=1, **options).losses[0][1]
    untrained = ff.convert(build())
    expected = evaluate(untrained, blocks[:16], build()).kl + 3 * distance(untrained)
    assert first == pytest.approx(expected, rel=1e-4)
    trained = {}
    for objective in ("kl", "kl+l2"):
        trained[objective] = ff.convert(build())
        ff.distill(trained[objective], blocks, SMALL, objective=objective, **options)
    assert distance(trained["kl+l2"]) < 0.9 * distance(trained["kl"])


def test_only_the_chosen_layers_are_trained(build, blocks):
    model = ff.convert(build())
    before = state(model)
    ff.distill(model, blocks, SMALL, steps=2, train_layers="last:1")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed
    assert all(name.startswith("model.layers.3.") for name in changed)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_embeddings_stay_and_a_tied_head_with_them(build, blocks, tied):
    model = ff.convert(build(tie_word_embeddings=tied))
    before = state(model)
    ff.distill(model, blocks, SMALL, steps=2, freeze_embeddings=True)
    assert torch.equal(before["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert torch.equal(before["lm_head.weight"], model.lm_head.weight) == tied


def test_every_token_that_counts_weighs_the_same_in_micro_batches_of_any_size(build, blocks):
    """Blocks with few and many counted tokens."""
    from farskip_fused.distillation import Blocks

    counted = torch.rand(96, 16, generator=torch.Generator().manual_seed(2)) < torch.linspace(0.05, 0.9, 96)[:, None]
    counted[3] = False
    rows = Blocks(blocks, counted=counted)
    losses = [
        ff.distill(ff.convert(build()), rows, SMALL, steps=1, batch_tokens=96 * 16, micro_batch_tokens=size).losses[0]
        for size in (16, 160, 96 * 16)
    ]
    assert losses[0][1] == pytest.approx(losses[2][1], rel=1e-5)
    assert losses[1][1] == pytest.approx(losses[2][1], rel=1e-5)
    assert losses[2][1] == pytest.approx(evaluate(ff.convert(build()), rows, build()).kl, rel=1e-5)


def test_early_stopping_waits_for_its_patience_and_forgives_small_drops():
    stopping = EarlyStopping(patience=3, drop=0.02)
    values = [0.30, 0.50, 0.49, 0.47, 0.485, 0.47, 0.40, 0.51, 0.40, 0.40, 0.40]
    best, stops = zip(*((stopping.is_best(value), stopping.stops) for value in values), strict=True)
    assert best == (True, True, False, False, False, False, False, True, False, False, False)
    assert stops == (False,) * 10 + (True,)


def test_training_stops_early_with_the_weights_of_the_best_look(build, blocks):
    seen = []

    def metric(model):
        assert not model.training
        seen.append(state(model))
        return [0.1, 0.9, 0.5, 0.4, 0.3, 0.2][len(seen) - 1]

    model = ff.convert(build())
    report = ff.distill(model, blocks, SMALL, metric=metric, metric_every=1, patience=2)
    assert (report.steps, report.stopped_early, report.best_tokens) == (4, True, 2 * 64)
    assert [value for _, value in report.metrics] == [0.1, 0.9, 0.5, 0.4]
    assert same(seen[1], state(model))


def test_the_guard_skips_what_is_not_finite_or_explodes():
    guard = Guard(explosion=10, most_skipped=1)
    assert all(guard.permits(step, 1.0, 1.0 + 0.01 * step) for step in range(1, ENOUGH + 1))
    assert not guard.permits(17, 1.0, 12.0)
    assert guard.permits(18, 1.0, 9.0)
    assert not guard.permits(19, math.nan, 1.0)
    assert not guard.diverged
    assert not guard.permits(20, 1.0, math.inf)
    assert guard.diverged
    assert [step for step, _, _ in guard.skipped] == [17, 19, 20]


def test_a_skipped_step_leaves_the_weights_and_is_reported(build, blocks):
    """The text of one step has a token whose embedding is not finite."""
    model = build()
    broken = blocks.clone()
    broken[broken == 63] = 5
    broken[17, 3] = 63
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = math.nan
    report = ff.distill(model, broken, SMALL, objective="sft", steps=24, batch_tokens=64)
    (skipped,) = report.skipped
    assert math.isnan(skipped[1])
    assert len(report.losses) == 23
    assert torch.isfinite(model.lm_head.weight).all()


def test_a_diverged_training_ends_with_the_best_weights_that_were_evaluated(build, blocks, monkeypatch):
    """From the third step on the model computes nothing finite."""
    model = build()
    taken = []

    def break_it(module, arguments):
        return (arguments[0] * math.nan,) if module.training and len(taken) == 2 else None

    def step(optimiser, *arguments, original=Optimiser.step):
        original(optimiser, *arguments)
        taken.append(state(model))

    model.lm_head.register_forward_pre_hook(break_it)
    monkeypatch.setattr(Optimiser, "step", step)
    with pytest.raises(FloatingPointError, match="the best that were evaluated"):
        ff.distill(model, blocks, SMALL, objective="sft", validation=blocks[:8], evaluations=8, most_skipped=1)
    assert any(same(each, state(model)) for each in taken)


def test_a_sweep_takes_the_lowest_training_loss_and_leaves_the_model(build, blocks):
    model = ff.convert(build())
    before = state(model)
    config = SMALL.changed(warmup_steps=0)
    found = sweep(model, blocks, config, "lr", values=(1e-6, 5e-3, 1e-5), steps=6)
    assert found.winner.value == 5e-3
    assert found.config == config.changed(learning_rate=5e-3)
    assert [trial.value for trial in found.trials] == [1e-6, 5e-3, 1e-5]
    assert same(before, state(model))
    batches = sweep(model, blocks, config, "batch", values=(32, 128), steps=6)
    assert batches.config.batch_tokens == batches.winner.value
    expected = ff.distill(ff.convert(build()), blocks, config, steps=6, batch_tokens=32).final_loss()
    assert batches.trials[0].loss == expected
    with pytest.raises(UsageError, match="Unknown sweep 'depth'; use one of batch, lr"):
        sweep(model, blocks, config, "depth")


def test_the_paper_preset_is_the_papers():
    paper = PRESETS["paper"]
    assert (paper.objective, paper.learning_rate, paper.warmup_steps) == ("kl", 2e-5, 1000)
    assert paper.steps * paper.batch_tokens == pytest.approx(10e9, rel=1e-4)
    assert (paper.metric_every, paper.patience, paper.metric_drop) == (1000, 20, 0.02)
