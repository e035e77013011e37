"""FCSD over two ranks gives what it gives in one process: FSDP2, and our expert parallelism."""

from __future__ import annotations

import copy

import pytest
import torch

import farskip_fused as ff
from farskip_fused.distillation import DistillationConfig, save_trained, train_tokenizer
from farskip_fused.distillation.data import Document
from farskip_fused.distillation.early_stopping import Snapshot
from farskip_fused.distillation.parallel import distribute
from farskip_fused.distillation.tasks.solving import continue_prompts
from farskip_fused.distillation.tasks.task import Task
from farskip_fused.errors import UsageError
from farskip_fused.launch import run_ranks

CONFIG = DistillationConfig(
    steps=3, batch_tokens=128, micro_batch_tokens=64, learning_rate=1e-3, warmup_steps=0, balance_rate=0.01
)


def train(memory, model, blocks, mode, folder):
    """On each rank: two steps, a state, and the rest after a new start from it; the losses, and the model saved."""
    torch.set_num_threads(1)
    options = {"validation": blocks[:4], "parallel": mode, "folder": folder / "work"}
    # What a spawned process is given lies in memory that all of them share.
    first, model = copy.deepcopy(model), copy.deepcopy(model)

    def interrupt(_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        ff.distill(first, blocks, CONFIG, metric=interrupt, checkpoint_every=2, **options)
    # A metric on which the ranks do not agree by themselves.
    options["metric"] = lambda _: float(memory.rank)
    report = ff.distill(model, blocks, CONFIG, resume=True, checkpoint_every=2, **options)
    save_trained(model, folder / "saved")
    return report.losses, report.evaluations[-1][1].to_dict(), report.skipped, report.metrics


def alone(model, blocks):
    report = ff.distill(model, blocks, CONFIG, validation=blocks[:4])
    return report.losses, report.evaluations[-1][1].to_dict(), report.skipped


@pytest.mark.full
@pytest.mark.rung2
@pytest.mark.parametrize("mode", ["fsdp", "ep"])
def test_two_ranks_train_as_one_and_resume(build, blocks, tmp_path, mode):
    blocks = blocks[:16]
    model = ff.convert(build())
    expected, trained = alone(single := copy.deepcopy(model), blocks), single.state_dict()
    found = run_ranks(train, 2, model, blocks, mode, tmp_path, limit=290.0)
    assert found[0] == found[1]
    assert [tokens for tokens, _ in found[0][0]] == [tokens for tokens, _ in expected[0]]
    losses = [[loss for _, loss in each[0]] for each in (found[0], expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert found[0][1] == pytest.approx(expected[1], rel=1e-3)
    loaded = ff.load(tmp_path / "saved").state_dict()
    assert loaded.keys() == trained.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


def write(memory, model, tokenizer):
    """On each rank: what the split model writes; the second rank ends at once."""
    torch.set_num_threads(1)
    distribute(model := copy.deepcopy(model), "ep", 64)
    stops = ("",) if memory.rank else ()
    with torch.no_grad():
        return continue_prompts(model, tokenizer, [Task("", "def f", "", stops=stops)], 3, together=True)[0]


@pytest.mark.full
@pytest.mark.rung2
def test_ranks_that_stop_writing_at_different_times_wait_for_each_other(build):
    tokenizer = train_tokenizer([Document("text", "def f(x):\n    return x\n", "0")], 270)
    model = ff.convert(build(vocab_size=270, num_hidden_layers=2))
    (alone,) = continue_prompts(model, tokenizer, [Task("", "def f", "")], 3)
    long, short = run_ranks(write, 2, model, tokenizer, limit=290.0)
    assert long == alone
    assert len(short) < len(long)


def test_ranks_need_torchrun(build, blocks):
    with pytest.raises(UsageError, match="needs torch"):
        ff.distill(ff.convert(build()), blocks, CONFIG, parallel="fsdp")
    with pytest.raises(UsageError, match="Unknown parallel mode 'ddp'; use one of fsdp, ep"):
        ff.distill(ff.convert(build()), blocks, CONFIG, parallel="ddp")


def test_a_snapshot_brings_back_weights_and_buffers(build):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    snapshot = Snapshot(model)
    snapshot.take()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    snapshot.restore()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
