"""AMD's Instella-MoE: its checkpoint layout read without its code, exact against the definition, and written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import farskip_fused as ff
from farskip_fused import conversion
from tests.conversion.conftest import layers_of
from tests.numerics import relative_error


@pytest.fixture
def stock(tiny: Any) -> Any:
    return tiny("deepseek_v3", torch.float32)


@pytest.fixture
def gates(stock: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(layer.self_attn.o_proj.in_features, stock.config.hidden_size) for layer in layers_of(stock)]
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@pytest.fixture
def published(stock: Any, gates: list[torch.Tensor], tmp_path: Path) -> Any:
    """``published(**keys)``: a directory in AMD's layout."""

    def write(**keys: Any) -> Path:
        path = tmp_path / "published"
        stock.save_pretrained(path)
        file = path / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        if keys.get("gated_attention", True):
            tensors |= {f"model.layers.{k}.self_attn.gate_proj.weight": gate for k, gate in enumerate(gates)}
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        code = {"auto_map": {"AutoModelForCausalLM": "modeling_instella_moe.InstellaMoEForCausalLM"}}
        identity = {"architectures": ["InstellaMoEForCausalLM"], "model_type": "deepseek_v3", "farskip": True}
        (path / "config.json").write_text(json.dumps(config | identity | code | keys))
        return path

    return write


def gated(stock: Any, gates: list[torch.Tensor]) -> Any:
    """The stock model with hooks that do what the gate does."""
    for layer, gate in zip(layers_of(stock), gates, strict=True):
        seen: dict[str, torch.Tensor] = {}

        def note(_m: Any, _a: Any, given: dict[str, Any], seen: Any = seen) -> None:
            seen["input"] = given["hidden_states"]

        def apply(_m: Any, given: Any, seen: Any = seen, gate: Any = gate) -> Any:
            return (given[0] * torch.sigmoid(seen["input"] @ gate.T.to(given[0].dtype)),)

        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
        layer.self_attn.o_proj.register_forward_pre_hook(apply)
    return stock


@pytest.mark.parametrize(
    ("keys", "attention", "mlp"),
    [
        ({}, range(5), range(5)),
        ({"farskip_start_idx": 2, "farskip_end_idx": 3}, (2, 3), (2, 3)),
        ({"attn_only_farskip": True}, range(5), ()),
        ({"mlp_only_farskip": True, "farskip_end_idx": 2}, (), range(3)),
        ({"farskip": False}, (), ()),
        ({"attn_only_farskip": True, "mlp_only_farskip": True}, (), ()),
    ],
)
def test_a_checkpoint_computes_the_definition(
    keys: Any, attention: Any, mlp: Any, published: Any, stock: Any, gates: Any, paper: Any, tokens: Any
) -> None:
    model = ff.load(published(**keys), dtype=torch.float64, experts_implementation="eager")
    expected, _ = paper(gated(stock.double(), gates), tokens, set(attention), set(mlp))
    with torch.no_grad():
        assert relative_error(model(tokens, use_cache=False).logits, expected) < 1e-12


def test_without_gates_there_are_none(published: Any, stock: Any, paper: Any, tokens: Any) -> None:
    model = ff.load(published(gated_attention=False), experts_implementation="eager")
    assert not any("gate_proj.weight" in name for name in model.state_dict() if "self_attn" in name)
    expected, _ = paper(stock, tokens, set(range(5)), set(range(5)))
    with torch.no_grad():
        assert relative_error(model(tokens, use_cache=False).logits, expected) < 1e-5


def test_a_gate_that_lacks_is_named(published: Any) -> None:
    path = published()
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    del tensors["model.layers.3.self_attn.gate_proj.weight"]
    safetensors.torch.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ff.UsageError, match=r"missing tensors model\.layers\.3\.self_attn\.gate_proj\.weight"):
        ff.load(path)


def test_it_is_exported_as_it_was(published: Any, tmp_path: Path) -> None:
    path = published(farskip_start_idx=1)
    conversion.export_instella(ff.load(path), tmp_path / "again")
    before, after = (safetensors.torch.load_file(each / "model.safetensors") for each in (path, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == ["InstellaMoEForCausalLM"]
    assert config["model_type"] == "deepseek_v3"
    said = {name: config[name] for name in ("farskip", "farskip_start_idx", "farskip_end_idx", "gated_attention")}
    assert said == {"farskip": True, "farskip_start_idx": 1, "farskip_end_idx": 4, "gated_attention": True}
    assert not config["attn_only_farskip"]
    assert not config["mlp_only_farskip"]
    assert conversion.connectivity_of(ff.load(tmp_path / "again"))[0] == ff.Connectivity.standard()


def test_it_survives_our_own_layout_and_generates(published: Any, tmp_path: Path, tokens: Any) -> None:
    model = ff.load(published(), experts_implementation="eager")
    model.save_pretrained(tmp_path / "ours")
    loaded = ff.load(tmp_path / "ours", experts_implementation="eager")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "farskip_instella_moe"
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(loaded(tokens).logits, logits)
        written = loaded.generate(tokens, max_new_tokens=3, do_sample=False)
        assert torch.equal(written[:, tokens.shape[1]], logits[:, -1].argmax(-1))


def test_what_its_keys_cannot_say_is_refused(published: Any, stock: Any, tmp_path: Path) -> None:
    model = ff.convert(ff.load(published()), layers=[0, 2])
    with pytest.raises(ff.UsageError, match="can only say one range"):
        conversion.export_instella(model, tmp_path / "again")
    with pytest.raises(ff.UsageError, match="has depth 2; an Instella checkpoint can only say depth 1"):
        conversion.export_instella(ff.convert(model, ff.Connectivity.farskip(depth=2)), tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(ff.UsageError, match="only Instella's"):
        conversion.export_instella(stock, tmp_path / "again")
    with pytest.raises(ff.UsageError, match="farskip_start_idx is 7"):
        ff.load(published(farskip_start_idx=7))
    for refused in (lambda: conversion.convert_checkpoint(published(), tmp_path / "target"),
                    lambda: conversion.check_checkpoint(published())):  # fmt: skip
        with pytest.raises(ff.UsageError, match="Instella-MoE checkpoint, FarSkip already"):
            refused()


def test_the_order_of_additions_changes_rounding_alone(published: Any, tokens: Any) -> None:
    path = published()
    with torch.no_grad():
        stock, last = (ff.load(path, additions=order)(tokens).logits for order in ("stock", "routed_last"))
    assert not torch.equal(stock, last)
    assert relative_error(last, stock) < 1e-5
    with pytest.raises(ff.UsageError, match="Unknown order of additions 'any'; use one of stock, routed_last"):
        ff.load(path, additions="any")
