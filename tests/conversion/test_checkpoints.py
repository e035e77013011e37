"""Converted checkpoints: saved, loaded, made from stock ones, and refused when damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import farskip_fused as ff
from farskip_fused import conversion
from farskip_fused.cli import main
from tests.conversion.conftest import families

PROGRAM = """
import sys, torch, farskip_fused as ff
from farskip_fused import conversion
from transformers import AutoModelForCausalLM
path, tokens, logits, names = torch.load(sys.argv[1])
for load in (ff.load, AutoModelForCausalLM.from_pretrained):
    model = load(path, experts_implementation="eager")
    assert [c.name for c in conversion.connectivity_of(model)] == names
    print((model(tokens).logits - logits).abs().max().item())
"""


@pytest.fixture
def saved(tiny: Any, tmp_path: Path) -> tuple[Any, Path]:
    model = ff.convert(tiny("deepseek_v3", torch.float32), layers="last:60%")
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


@pytest.fixture
def sharded(tiny: Any, tmp_path: Path) -> Path:
    ff.convert(tiny("qwen3_moe", torch.float32)).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    return tmp_path / "sharded"


@pytest.fixture
def stock(tiny: Any, tmp_path: Path) -> Path:
    tiny("qwen3_moe", torch.float32).save_pretrained(tmp_path / "stock")
    (tmp_path / "stock" / "tokenizer.json").write_text("{}")
    return tmp_path / "stock"


def refusal(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    assert leaving.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0
    return message


@pytest.mark.parametrize("family", families())
def test_every_family_survives_saving_and_loading(family: str, tiny: Any, tokens: Any, tmp_path: Path) -> None:
    stock = tiny(family, torch.float32)
    stock.save_pretrained(tmp_path / "stock")
    model = ff.convert(stock, "moe_only", [1, 3])
    model.save_pretrained(tmp_path / "converted")
    loaded = ff.load(tmp_path / "converted", experts_implementation="eager")
    assert type(loaded) is type(model)
    assert conversion.connectivity_of(loaded) == conversion.connectivity_of(model)
    assert (loaded(tokens).logits - model(tokens).logits).abs().max() == 0.0
    assert conversion.check_checkpoint(tmp_path / "converted")["layers"] == [1, 3]
    of_stock = safetensors.torch.load_file(tmp_path / "stock" / "model.safetensors")
    of_converted = safetensors.torch.load_file(tmp_path / "converted" / "model.safetensors")
    assert of_converted.keys() == of_stock.keys(), "names of tensors are those of the hub"
    assert all(torch.equal(of_converted[name], of_stock[name]) for name in of_stock)


def test_config_says_which_connectivity_and_where(saved: tuple[Any, Path]) -> None:
    config = json.loads((saved[1] / "config.json").read_text())
    assert config["model_type"] == "farskip_deepseek_v3"
    assert config["architectures"] == ["FarSkipDeepseekV3ForCausalLM"]
    assert config["farskip"] == {
        "version": 1,
        "connectivity": {"attention_reads_partial": True, "mlp_reads_before_attention": True, "depth": 1},
        "layers": "2:5",
    }


def test_a_new_process_loads_the_same_model(saved: tuple[Any, Path], tokens: Any, tmp_path: Path) -> None:
    model, path = saved
    names = [connectivity.name for connectivity in conversion.connectivity_of(model)]
    with torch.no_grad():
        torch.save((str(path), tokens, model(tokens).logits, names), tmp_path / "expected.pt")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.stdout.split() == ["0.0", "0.0"], done.stderr


def test_transformers_alone_refuses_a_converted_checkpoint(saved: tuple[Any, Path]) -> None:
    program = f"from transformers import AutoModelForCausalLM as Auto; Auto.from_pretrained({str(saved[1])!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "farskip_deepseek_v3" in done.stderr


def test_saving_as_teacher_writes_the_student(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = saved
    with conversion.as_teacher(model):
        model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (path / "config.json").read_text()


def test_a_reverted_model_is_saved_as_stock(saved: tuple[Any, Path], tmp_path: Path) -> None:
    ff.revert(saved[0]).save_pretrained(tmp_path / "stock")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["model_type"] == "deepseek_v3"
    assert "farskip" not in config


def test_loading_takes_the_options_of_transformers(saved: tuple[Any, Path]) -> None:
    assert ff.load(saved[1], dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_missing_directory_is_refused_and_never_looked_up(tmp_path: Path) -> None:
    with pytest.raises(ff.UsageError, match="is not a directory"):
        ff.load(tmp_path / "nowhere")
    with pytest.raises(ff.UsageError, match="organisation/model is not a directory"):
        ff.load("organisation/model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json is missing"),
        ("", "damaged or half-written"),
        ('{"model_type": "farskip_qw', "damaged or half-written"),
        ("[]", "must hold an object"),
        ("{}", "has no model_type"),
        ('{"model_type": "llamas"}', "stock llamas checkpoint"),
        ('{"model_type": "farskip_llamas"}', "no language model of type 'llamas'"),
        ('{"model_type": "farskip_qwen3_moe", "num_hidden_layers": 5}', 'The "farskip" entry'),
        ('{"model_type": "farskip_qwen3_moe", "farskip": {}}', "has no num_hidden_layers"),
    ],
)
def test_a_damaged_configuration_is_refused(content: str | None, message: str, sharded: Path) -> None:
    if content is None:
        (sharded / "config.json").unlink()
    else:
        (sharded / "config.json").write_text(content)
    for function in (ff.load, conversion.check_checkpoint):
        with pytest.raises(ff.UsageError, match=message):
            function(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2, this package reads 1"),
        ({"connectivity": {"depth": 1}}, "unknown connectivity"),
        ({"connectivity": "farskip"}, "unknown connectivity"),
        ({"layers": "0:9"}, "outside the model's 5 layers"),
    ],
)
def test_a_record_of_something_else_is_refused(change: dict[str, Any], message: str, sharded: Path) -> None:
    config = json.loads((sharded / "config.json").read_text())
    config["farskip"] |= change
    (sharded / "config.json").write_text(json.dumps(config))
    with pytest.raises(ff.UsageError, match=message):
        ff.load(sharded)


def test_a_configuration_without_record_builds_no_model(tiny: Any) -> None:
    model = ff.convert(tiny("qwen3_moe"))
    del model.config.farskip
    with pytest.raises(ff.UsageError, match='"farskip" entry'):
        type(model)(model.config)


def test_missing_and_truncated_weights_are_refused(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    content = shards[1].read_bytes()
    for damaged in (content[:-100], content[:20], b""):
        shards[1].write_bytes(damaged)
        with pytest.raises(ff.UsageError, match=f"{shards[1].name} is truncated or damaged"):
            ff.load(sharded)
    shards[1].unlink()
    with pytest.raises(ff.UsageError, match=f"{shards[1].name} is missing"):
        ff.load(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(ff.UsageError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        ff.load(sharded)


def test_an_index_that_lists_too_much_or_nothing_is_refused(sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.extra"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))
    with pytest.raises(ff.UsageError, match=r"lists model\.extra, which the files lack"):
        ff.load(sharded)
    file.write_text('{"weight_map": {}}')
    with pytest.raises(ff.UsageError, match="no weight_map"):
        ff.load(sharded)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.2.mlp.experts.3.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"]
)
def test_tensors_that_lack_are_named(name: str, saved: tuple[Any, Path]) -> None:
    file = saved[1] / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors[name]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ff.UsageError, match=name.replace(".", r"\.") + " are missing"):
        conversion.check_checkpoint(saved[1])
    with pytest.raises(ff.UsageError):
        ff.load(saved[1])


def test_tensors_too_many_or_of_another_shape_are_named(saved: tuple[Any, Path]) -> None:
    file = saved[1] / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(tensors | {"model.extra": torch.zeros(1)}, file, metadata={"format": "pt"})
    for function in (ff.load, conversion.check_checkpoint):
        with pytest.raises(ff.UsageError, match=r"model\.extra"):
            function(saved[1])
    tensors["model.norm.weight"] = torch.zeros(7)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ff.UsageError, match=r"model\.norm\.weight have another shape"):
        conversion.check_checkpoint(saved[1])
    with pytest.raises(ff.UsageError):
        ff.load(saved[1])


def test_a_stock_checkpoint_is_sent_to_convert(stock: Path) -> None:
    for function in (ff.load, conversion.check_checkpoint):
        with pytest.raises(ff.UsageError, match=r"stock qwen3_moe checkpoint.*farskip convert"):
            function(stock)


def test_convert_command_equals_converting_the_model(stock: Path, tiny: Any, tokens: Any, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in stock.iterdir()}
    target, report = tmp_path / "new" / "target", tmp_path / "report.json"
    with pytest.raises(SystemExit) as leaving:
        main(["convert", str(stock), str(target), "--layers", "last:2", "--check", "--json", str(report)])
    assert leaving.value.code == 0
    expected = ff.convert(tiny("qwen3_moe", torch.float32), layers=[3, 4])
    loaded = ff.load(target, experts_implementation="eager")
    assert (loaded(tokens).logits - expected(tokens).logits).abs().max() == 0.0
    said = json.loads(report.read_text())
    assert said["path"] == str(target)
    assert (said["model_type"], said["connectivity"], said["layers"]) == ("farskip_qwen3_moe", "farskip", [3, 4])
    assert said["num_layers"] == 5
    assert said["bytes"] == len(before["model.safetensors"])
    assert {file.name for file in target.iterdir()} == before.keys()
    assert {file.name: file.read_bytes() for file in stock.iterdir()} == before
    assert [file.name for file in target.parent.iterdir()] == ["target"]


def test_saving_over_a_target_leaves_the_source_as_it_is(stock: Path, tmp_path: Path) -> None:
    conversion.convert_checkpoint(stock, tmp_path / "target")
    weights = tmp_path / "target" / "model.safetensors"
    before = (stock / "model.safetensors").read_bytes()
    assert weights.samefile(stock / "model.safetensors")
    model = ff.load(tmp_path / "target")
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "target")
    assert (stock / "model.safetensors").read_bytes() == before != weights.read_bytes()


def test_weights_are_copied_where_they_cannot_be_linked(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("other file system")

    monkeypatch.setattr(os, "link", refuse)
    conversion.convert_checkpoint(stock, tmp_path / "target", check=True)
    assert not (tmp_path / "target" / "model.safetensors").samefile(stock / "model.safetensors")


def test_a_download_cache_of_links_becomes_files(stock: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for file in stock.iterdir():
        (cache / file.name).symlink_to(file)
    conversion.convert_checkpoint(cache, tmp_path / "target", check=True)
    assert not any(file.is_symlink() for file in (tmp_path / "target").iterdir())


def test_a_converted_checkpoint_can_be_converted_again(stock: Path, tmp_path: Path) -> None:
    conversion.convert_checkpoint(stock, tmp_path / "once", ff.Connectivity.farskip(depth=2))
    assert conversion.connectivity_of(ff.load(tmp_path / "once"))[0].depth == 2
    report = conversion.convert_checkpoint(tmp_path / "once", tmp_path / "twice", "attention_only", "first:1")
    assert (report["connectivity"], report["layers"]) == ("attention_only", [0])
    assert conversion.connectivity_of(ff.load(tmp_path / "twice"))[0] == ff.Connectivity.attention_only()


def test_nothing_is_overwritten_unless_told(stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("1")
    assert "exists" in refusal(["convert", stock, target], capsys)
    assert [file.name for file in target.iterdir()] == ["precious"]
    with pytest.raises(SystemExit) as leaving:
        main(["convert", str(stock), str(target), "--overwrite", "--layers", "0,2"])
    assert leaving.value.code == 0
    assert conversion.check_checkpoint(target)["layers"] == [0, 2]
    assert not (target / "precious").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["stock", "target"]


def test_a_failed_conversion_leaves_no_trace(stock: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(stock / "model.safetensors")
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, stock / "model.safetensors", metadata={"format": "pt"})
    old = tmp_path / "old"
    old.mkdir()
    (old / "precious").write_text("1")
    for target in (tmp_path / "target", old):
        with pytest.raises(ff.UsageError, match=r"lm_head\.weight are missing"):
            conversion.convert_checkpoint(stock, target, check=True, overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old", "stock"]
    assert (old / "precious").read_text() == "1"


def test_bad_arguments_of_the_command(stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([stock], "Name a TARGET"),
        ([tmp_path / "nowhere", target], "is not a directory"),
        ([stock, target, "--connectivity", "sideways"], "Unknown connectivity 'sideways'"),
        ([stock, target, "--layers", "some"], "Unknown layers expression 'some'"),
        ([stock, target, "--layers", "7,1"], "outside the model's 5 layers"),
        ([stock, stock, "--overwrite"], "lie in each other"),
        ([stock, stock / "inside"], "lie in each other"),
        ([stock, tmp_path, "--overwrite"], "lie in each other"),
        ([stock, tmp_path / "file", "--overwrite"], "is a file"),
        ([stock, "--check"], "farskip convert"),
    ):
        assert message in refusal(["convert", *arguments], capsys)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "stock"]


def test_checkpoints_with_code_of_their_own(stock: Path, tmp_path: Path) -> None:
    config = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "configuration_x.X"}}))
    conversion.convert_checkpoint(stock, tmp_path / "target")
    assert "auto_map" not in json.loads((tmp_path / "target" / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps(config | {"architectures": ["OwnMoEForCausalLM"]}))
    with pytest.raises(ff.UsageError, match=r"OwnMoEForCausalLM.*only Qwen3MoeForCausalLM is supported"):
        conversion.convert_checkpoint(stock, tmp_path / "other")


def test_a_quantised_checkpoint_cannot_be_checked(stock: Path, tmp_path: Path) -> None:
    config = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    conversion.convert_checkpoint(stock, tmp_path / "target")
    with pytest.raises(ff.UsageError, match="is quantised"):
        conversion.check_checkpoint(tmp_path / "target")


def test_tied_and_fused_forms_pass_the_check(tiny: Any, tokens: Any, tmp_path: Path) -> None:
    model = ff.convert(tiny("qwen3_moe", torch.float32, tie_word_embeddings=True))
    for form, options in (("hub", {}), ("fused", {"save_original_format": False})):
        model.save_pretrained(tmp_path / form, **options)
        stored = safetensors.torch.load_file(tmp_path / form / "model.safetensors")
        assert ("model.layers.0.mlp.experts.gate_up_proj" in stored) == (form == "fused")
        assert "lm_head.weight" not in stored
        conversion.check_checkpoint(tmp_path / form)
        loaded = ff.load(tmp_path / form, experts_implementation="eager")
        parameters = dict(model.named_parameters())
        assert all(torch.equal(value, parameters.pop(name)) for name, value in loaded.named_parameters())
        assert not parameters
        # The last bit is BLAS's: on some processors it follows where in memory a weight lies.
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-6, atol=1e-6)


def test_generation_settings_and_tokenizer_travel(stock: Path, tmp_path: Path) -> None:
    conversion.convert_checkpoint(stock, tmp_path / "target")
    assert (tmp_path / "target" / "tokenizer.json").read_text() == "{}"
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "target")
    assert settings.eos_token_id == 2
