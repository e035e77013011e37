"""The forms of the teacher: what each says, what each holds, and that nobody is changed by teaching."""

from __future__ import annotations

import pytest
import torch

import farskip_fused as ff
from farskip_fused.distillation import Blocks, evaluate
from farskip_fused.distillation.teacher import Shared, teacher_of
from farskip_fused.errors import UsageError


def untrained_and_trained(build):
    """A converted model's teacher from before and the same model with other weights."""
    model = ff.convert(build())
    teacher = Shared(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(0.1)
    return model, teacher


def test_a_shared_teacher_is_the_stock_model_from_before(build, blocks):
    model, teacher = untrained_and_trained(build)
    changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert evaluate(build(), blocks, teacher).kl == 0.0
    assert all(torch.equal(changed[name], tensor) for name, tensor in model.state_dict().items())


def test_a_shared_teacher_keeps_a_second_version_only_of_what_is_trained(build):
    model = ff.convert(build())
    model.requires_grad_(False)
    trained = model.model.layers[3].mlp.gate.weight.requires_grad_()
    teacher = Shared(model)
    kept = {id(mine) for mine, _ in teacher._pairs}
    assert kept == {id(trained), *(id(each) for each in model.buffers())}
    assert teacher.head.weight.data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("form", ["copy", "offload", "int8"])
def test_a_separate_teacher_says_what_the_stock_model_says(build, blocks, form):
    rows = Blocks(blocks[:8])
    model = ff.convert(build())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = build()
    with teacher_of(model, None, form) as teacher, torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # whatever happens to the model
        found = evaluate(expected, rows, teacher)
        own = {parameter.dtype for parameter in teacher.model.parameters()}
    if form == "int8":
        assert 0 < found.kl < 0.01
        assert torch.int8 in own
    else:
        assert found.kl == 0.0
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert before.keys() == model.state_dict().keys()


def test_an_offloaded_teacher_holds_no_layer_between_its_passes(build):
    with teacher_of(ff.convert(build()), None, "offload") as teacher:
        inside = [p for layer in teacher.model.model.layers for p in layer.parameters()]
        assert all(parameter.is_meta for parameter in inside)
        assert not teacher.model.lm_head.weight.is_meta


def test_matrices_in_8_bits_are_near_and_a_quarter_of_the_size(build):
    model = ff.convert(build())
    model.model.layers[2].mlp.gate.part = torch.nn.Linear(32, 4)
    with teacher_of(model, None, "int8") as teacher:
        experts, original = teacher.model.model.layers[2].mlp.experts, model.model.layers[2].mlp.experts
        difference = (experts.gate_up_proj - original.gate_up_proj).abs().amax(dim=-1)
        assert (difference <= original.gate_up_proj.abs().amax(dim=-1) / 254 * 1.01).all()
        router = dict(teacher.model.model.layers[2].mlp.gate.named_parameters())
        assert router.keys() == {"weight", "part.weight", "part.bias"}
        stored = sum(p.nbytes for p in experts.parameters())
        assert stored < 0.35 * sum(p.nbytes for p in original.parameters())


@pytest.mark.full
@pytest.mark.parametrize("form", ["shared", "copy", "offload", "int8"])
def test_every_form_teaches(build, blocks, form):
    model = ff.convert(build())
    options = {"steps": 8, "batch_tokens": 256, "learning_rate": 5e-3, "warmup_steps": 0}
    losses = ff.distill(model, blocks, teacher_form=form, **options).losses
    assert losses[-1][1] < 0.8 * losses[0][1]


def test_forms_agree_on_every_loss(build, blocks):
    def losses(form):
        options = {"steps": 3, "batch_tokens": 256, "learning_rate": 5e-3, "balance_rate": 0.1}
        return ff.distill(ff.convert(build()), blocks, teacher_form=form, **options).losses

    assert losses("shared") == losses("copy") == losses("offload")


def test_a_given_teacher_in_8_bits_is_a_copy(build, blocks):
    teacher = build(seed=1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    ff.distill(build(), blocks, teacher=teacher, teacher_form="int8", steps=1, batch_tokens=256)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_an_unknown_form_is_refused(build, blocks):
    with pytest.raises(UsageError, match="Unknown teacher_form 'smaller'; use one of shared, copy, offload, int8"):
        ff.distill(ff.convert(build()), blocks, teacher_form="smaller")
