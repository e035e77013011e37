"""Training converted models with what others bring: checkpointing, FSDP2, tensor parallelism, LoRA, torch.compile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import farskip_fused as ff
from farskip_fused.launch import run_ranks
from tests.conversion.conftest import families, layers_of, mixer_of
from tests.conversion.tiny_models import build

peft = pytest.importorskip("peft")
NOT_COMPILED: set[str] = set()
WITHOUT_PLAN: set[str] = set()
SEVERAL = ["deepseek_v3", "qwen3_moe", "granitemoeshared"]


def gradients(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest over all tensors, each relative to its own largest entry."""
    assert found.keys() == expected.keys()
    return max(
        ((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-6)).item()
        for name in expected
    )


@pytest.mark.parametrize("family", families([*SEVERAL, "qwen3_next"]))
def test_activation_checkpointing_leaves_gradients_as_they_are(family: str, tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny(family, torch.float32)).train()
    expected = gradients(model, tokens)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    mixer_of(layers_of(model)[0]).register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, tokens)
    assert len(calls) == 2, "the layer must run again in the backward pass"
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_reentrant_activation_checkpointing_is_refused(tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny("qwen3_moe", torch.float32)).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ff.UsageError, match='"use_reentrant": False'):
        model(tokens, labels=tokens, use_cache=False)


@pytest.mark.parametrize("family", families(SEVERAL))
def test_a_lora_trains_and_starts_from_the_converted_model(family: str, tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny(family, torch.float32)).train()
    expected = model(tokens, use_cache=False).logits.detach()
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian")
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(adapted(tokens, use_cache=False).logits, expected)
    found = gradients(adapted, tokens)
    assert found
    assert all("lora_" in name for name in found)
    assert sum(bool(gradient.any()) for gradient in found.values()) >= len(found) // 2
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
    before = adapted(tokens, labels=tokens, use_cache=False).loss
    optimizer.step()
    assert adapted(tokens, labels=tokens, use_cache=False).loss < before
    merged = adapted.merge_and_unload()
    assert merged is model
    assert not torch.equal(model(tokens, use_cache=False).logits, expected)


# Where transformers lets a graph have no breaks: not with recurrences or a choice of experts by loops.
@pytest.mark.parametrize("family", families(["deepseek_v3"], without=NOT_COMPILED))
def test_torch_compile_takes_the_model_whole(family: str, tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny(family, torch.float32, experts_implementation="grouped_mm", num_hidden_layers=3)).train()
    expected, logits = gradients(model, tokens), model(tokens, use_cache=False).logits
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(tokens, use_cache=False).logits
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    model.zero_grad()
    compiled(tokens, labels=tokens, use_cache=False).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_difference(found, expected) < 1e-3


def sharded_gradients(memory: Any, family: str, tokens: torch.Tensor, checkpointing: bool) -> float:
    """On each rank: FSDP2 on every layer, against the whole model."""
    model = ff.convert(build(family, torch.float32)).train()
    expected = gradients(copy.deepcopy(model), tokens)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(model)
    model.zero_grad()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    return relative_difference(found, expected)


@pytest.mark.rung2
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("family", families(["deepseek_v3"]))
def test_fsdp2_over_two_ranks_gives_the_gradients_of_one(family: str, checkpointing: bool, tokens: Any) -> None:
    assert max(run_ranks(sharded_gradients, 2, family, tokens, checkpointing)) < 1e-5


def tensor_parallel_logits(memory: Any, path: str, tokens: torch.Tensor, sizes: dict[str, int]) -> Any:
    model = ff.load(path, distributed_config=sizes)
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    with torch.no_grad():
        return model(tokens, use_cache=False).logits.numpy()


@pytest.mark.rung2
@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"tp_size": 2, "ep_size": 2}], ids=["tp", "tp+ep"])
@pytest.mark.parametrize("family", families(["deepseek_v3"], without=WITHOUT_PLAN))
def test_tensor_parallel_plans_give_the_logits_of_one_rank(
    family: str, sizes: dict[str, int], tiny: Any, tokens: Any, tmp_path: Any
) -> None:
    model = ff.convert(tiny(family, torch.float32))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    for logits in run_ranks(tensor_parallel_logits, 2, str(tmp_path), tokens, sizes):
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
