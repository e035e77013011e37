"""Converted checkpoints in SGLang answer as in transformers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("needs SGLang: make test-sglang", allow_module_level=True)

import torch

from farskip_fused.engines import sglang as adapter
from farskip_fused.engines.wiring import Wiring
from farskip_fused.errors import UsageError
from tests.engines.served import Answer, assert_same_answer
from tests.engines.sglang_engine import serve
from tests.engines.sglang_reference import ANSWERS, CASES, folder_of

pytestmark = pytest.mark.timeout(1200)  # an engine is several processes that import SGLang

CONVERTED = [case for case in CASES if case[1] not in (None, "standard")]


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints and transformers' answers are."""
    folder = tmp_path_factory.mktemp("references")
    python = os.environ.get("REFERENCE_PYTHON", ".venv/bin/python")
    subprocess.run([python, "-m", "tests.engines.sglang_reference", str(folder)], check=True)
    return folder


def assert_as_in_transformers(answers: list[Answer], path: Path) -> None:
    for answer, expected in zip(answers, json.loads((path / ANSWERS).read_text()), strict=True):
        assert_same_answer(answer, expected["tokens"], torch.tensor(expected["logprobs"]))


@pytest.mark.parametrize(("family", "connectivity", "layers"), CONVERTED)
def test_converted_model_answers_as_in_transformers(
    family: str, connectivity: str, layers: str, references: Path, tmp_path: Path
) -> None:
    path = references / folder_of(family, connectivity, layers)
    assert_as_in_transformers(serve(path, tmp_path / "answers"), path)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_two_ranks_answer_as_in_transformers(family: str, references: Path, tmp_path: Path) -> None:
    path = references / folder_of(family, "farskip")
    assert_as_in_transformers(serve(path, tmp_path / "answers", ranks=2), path)


def test_standard_connectivity_answers_bit_for_bit_as_stock_sglang(references: Path, tmp_path: Path) -> None:
    standard, stock = (
        serve(references / folder_of("deepseek_v3", connectivity), tmp_path / str(connectivity))
        for connectivity in ("standard", None)
    )
    assert standard == stock


def test_sums_are_under_way_while_what_does_not_read_them_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from farskip_fused.engines.sglang import layers

    events: list[str] = []

    def log(event: str) -> Callable[..., Any]:
        return lambda value, *args, **kwargs: events.append(event) or value

    class Layer(layers.FarSkipLayer):
        wiring = Wiring(is_moe=True, reads_partial=True, mlp_first=True, splits=True)
        layer_communicator = SimpleNamespace(prepare_attn=lambda stream, residual, batch: (stream, stream))
        mlp = SimpleNamespace(forward_normal=log("routed experts"))

        def post_attention_layernorm(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> Any:
            return hidden_states + residual, hidden_states + residual

        def shared_output(self, mlp_input: torch.Tensor) -> torch.Tensor:
            events.append("shared experts")
            return mlp_input

    monkeypatch.setattr(layers.all_reduce, "start", log("start"))
    monkeypatch.setattr(layers.all_reduce, "finish", log("finish"))
    routed, stream = Layer().run(torch.full((1,), 1.0), torch.full((1,), 2.0), None, log("attention"))
    layer_before = ["attention", "finish"]
    attention = ["shared experts", "start", "routed experts", "start", "finish"]
    assert events == layer_before + attention
    assert (routed.item(), stream.item()) == (3.0, 3.0 + 2.0 + 3.0)


@pytest.fixture
def registered() -> None:
    """What SGLang does with its plugins, in this process."""
    from sglang.srt.plugins import load_plugins

    load_plugins()


def test_registry_finds_the_models_by_the_architecture_of_a_checkpoint(registered: None) -> None:
    from sglang.srt.models.registry import ModelRegistry

    for name in ("DeepseekV2", "DeepseekV3", "Qwen3Moe"):
        architecture = f"FarSkip{name}ForCausalLM"
        found, resolved = ModelRegistry.resolve_model_cls([architecture])
        assert (found.__name__, found.__module__) == (architecture, "farskip_fused.engines.sglang.models")
        assert resolved == architecture


def test_another_external_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(adapter.VARIABLE, "someone.elses")
    with pytest.raises(UsageError, match=r"someone\.elses.*unset"):
        adapter.register()


def test_latent_attention_is_found_and_the_architecture_kept(registered: None, references: Path) -> None:
    from sglang.srt.configs.model_config import AttentionArch, ModelConfig

    config = ModelConfig(str(references / folder_of("deepseek_v3", "farskip")))
    assert config.attention_arch == AttentionArch.MLA
    assert config.hf_config.architectures == ["FarSkipDeepseekV3ForCausalLM"]
    assert config.hf_config.model_type == "deepseek_v3"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pp_size": 2}, "--pp-size"),
        ({"enable_dp_attention": True}, "--enable-dp-attention"),
        ({"attn_cp_size": 2}, "--attn-cp-size"),
        ({"moe_a2a_backend": "deepep"}, "--moe-a2a-backend"),
        ({"moe_dp_size": 2}, "--moe-dp-size"),
        ({"enable_two_batch_overlap": True}, "single-batch overlap"),
        ({"enable_attn_tp_input_scattered": True}, "--enable-attn-tp-input-scattered"),
        ({"moe_dense_tp_size": 1}, "--moe-dense-tp-size"),
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm"),
        ({"enforce_shared_experts_fusion": True}, "--enforce-shared-experts-fusion"),
        ({"quant_config": object()}, "quantised"),
    ],
)
def test_what_does_not_run_is_refused_with_a_sentence(change: dict[str, Any], sentence: str) -> None:
    from sglang.srt.server_args import ServerArgs

    from farskip_fused.engines.sglang.models import check

    defaults = {field.name: field.default for field in dataclasses.fields(ServerArgs)}
    check(SimpleNamespace(**defaults), None)
    quant_config = change.pop("quant_config", None)
    with pytest.raises(UsageError, match=sentence):
        check(SimpleNamespace(**(defaults | change)), quant_config)
