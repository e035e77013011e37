"""A transformers model whose experts are split computes what it computed before."""

import copy

import pytest
import torch

import farskip_fused as ff
from farskip_fused import demo_expert_parallel
from tests.conversion.conftest import TYPICAL, families
from tests.numerics import DEVICE, assert_close
from tests.rungs import RUNGS

OTHER_EXPERTS = {
    "gpt_oss": "GptOssExperts has interleaved gate and up rows",
    "minimax_m3_vl": "MiniMaxM3VLExperts has an activation of its own",
}


@pytest.mark.parametrize(
    "family", families([*TYPICAL, "aria_text", "dots1", "olmoe", "mixtral"], without=OTHER_EXPERTS)
)
def test_every_family_runs_on_the_kernels(tiny, tokens, family):
    model = ff.convert(tiny(family, torch.float32, num_hidden_layers=3 if family == "flint" else 2)).to(DEVICE)
    tokens = tokens.to(DEVICE)
    split = ff.parallelize(copy.deepcopy(model), ff.init(device=DEVICE), max_tokens=tokens.numel())
    with torch.no_grad():
        assert_close(split(tokens).logits, model(tokens).logits, torch.float32)


@pytest.mark.parametrize("device", RUNGS)
def test_two_ranks_give_the_logits_and_gradients_of_one(tiny, tmp_path, device):
    ff.convert(tiny("deepseek_v3", torch.float32, num_hidden_layers=3)).save_pretrained(tmp_path / "model")
    report = demo_expert_parallel.run(tmp_path / "model", device=device)
    assert report["world"] == 2
    assert report["backend"] == ("shm" if device == "cpu" else "nvshmem")
    assert 0 < report["forward_rel_error"] < 1e-5
    assert 0 < report["backward_rel_error"] < 1e-5


@pytest.mark.parametrize("family", OTHER_EXPERTS)
def test_experts_that_compute_something_else_are_refused(tiny, family):
    model = ff.convert(tiny(family, torch.float32, num_hidden_layers=2).to(DEVICE))
    with pytest.raises(ff.UsageError, match=OTHER_EXPERTS[family]):
        ff.parallelize(model, ff.init(device=DEVICE))


def test_what_cannot_be_split_is_refused(tiny):
    memory = ff.init(device=DEVICE)
    model = tiny("deepseek_v3", torch.float64, num_hidden_layers=2).to(DEVICE)
    with pytest.raises(TypeError, match="float64"):
        ff.parallelize(model, memory)
    with pytest.raises(ff.UsageError, match="ReLU"):
        model.model.layers[1].mlp.experts.act_fn = torch.nn.ReLU()
        ff.parallelize(model, memory)
    model = ff.parallelize(tiny("deepseek_v3", torch.float32, num_hidden_layers=2).to(DEVICE), memory, max_tokens=8)
    with pytest.raises(ff.UsageError, match="parallel already"):
        ff.parallelize(model, memory)
    with pytest.raises(ff.UsageError, match="this rank's experts only"):
        model.save_pretrained("anywhere")


def test_experts_that_do_not_divide_are_refused():
    memory = ff.init(device=DEVICE)
    memory.world = 2
    with pytest.raises(ff.UsageError, match="3 experts do not divide over 2 ranks"):
        ff.FusedExperts(16, 16, 3, 1, ep=memory, max_tokens=4)
