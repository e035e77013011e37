"""Converted checkpoints in vLLM answer as in transformers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from farskip_fused.errors import UsageError
from tests.engines.served import FAMILIES, assert_same_answers, make, serve

KERNELS = {"additional_config": {"farskip_experts": True}}


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_model_answers_as_in_transformers(family: str, checkpoints: Path) -> None:
    path = make(family, checkpoints, "farskip")
    assert_same_answers(serve(path), path)


@pytest.mark.parametrize(
    ("family", "connectivity", "layers"),
    [
        ("deepseek_v3", "attention_only", "all"),
        ("deepseek_v3", "moe_only", "all"),
        ("deepseek_v3", "farskip", "last:50%"),
        ("qwen3_moe", "attention_only", "0:3"),
    ],
)
def test_parts_of_farskip_answer_as_in_transformers(
    family: str, connectivity: str, layers: str, checkpoints: Path
) -> None:
    path = make(family, checkpoints, connectivity, layers)
    assert_same_answers(serve(path), path)


def test_compiled_model_answers_as_in_transformers(checkpoints: Path) -> None:
    path = make("deepseek_v3", checkpoints, "farskip")
    assert_same_answers(serve(path, eager=False), path)


def test_standard_connectivity_answers_bit_for_bit_as_stock_vllm(checkpoints: Path) -> None:
    standard, stock = (make("deepseek_v3", checkpoints, connectivity) for connectivity in ("standard", None))
    assert serve(standard) == serve(stock)


def test_kernels_answer_for_a_stock_model(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from farskip_fused.engines.vllm import experts

    shapes = []
    apply = experts.FarSkipExperts.apply

    def spy(self: Any, output: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        shapes.append(output.shape)
        apply(self, output, *args, **kwargs)

    monkeypatch.setattr(experts.FarSkipExperts, "apply", spy)
    path = make("qwen3_moe", checkpoints, None)
    assert_same_answers(serve(path, **KERNELS), path)
    assert len(shapes) > 4


@pytest.mark.parametrize("family", ["deepseek_v3", "llama4_text"])
def test_kernels_answer_for_a_converted_model(family: str, checkpoints: Path) -> None:
    """With shared experts, and with scores that scale the experts' inputs."""
    path = make(family, checkpoints, "farskip")
    assert_same_answers(serve(path, **KERNELS), path)


def test_kernels_are_refused_with_the_reason() -> None:
    from farskip_fused.engines.vllm import settings
    from farskip_fused.engines.vllm.experts import reason_against

    given: Any = SimpleNamespace(additional_config={"farskip_experts": "yes"})
    with pytest.raises(UsageError, match=r"yes.*--additional-config"):
        settings.read(given, settings.EXPERTS)
    assert settings.read(given, settings.ALL_REDUCE) is None
    assert "quantised" in str(reason_against(object()))


def test_communication_that_is_refused_stays_vllms_unless_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from farskip_fused.engines.vllm import ranks, settings

    lines: list[str] = []
    monkeypatch.setattr(ranks.logger, "info_once", lambda line, *values: lines.append(line % values), raising=False)
    monkeypatch.setattr(ranks, "current_platform", SimpleNamespace(is_cuda=lambda: True))

    def refuse() -> None:
        raise UsageError("The backend needs nvshmem4py.")

    def choose(make: Any, setting: bool | None) -> Any:
        config: Any = SimpleNamespace(additional_config={} if setting is None else {settings.ALL_REDUCE: setting})
        return ranks.ours_or_none("Sums", config, settings.ALL_REDUCE, make)

    assert choose(lambda: "ours", None) == choose(lambda: "ours", True) == "ours"
    assert choose(refuse, None) is choose(lambda: "ours", False) is None
    with pytest.raises(UsageError, match="nvshmem4py"):
        choose(refuse, True)
    ours, reason = "Sums: farskip_fused's", "Sums: vLLM's own ({})"
    why = ("The backend needs nvshmem4py.", "farskip_all_reduce is false")
    assert lines == [ours, ours, *map(reason.format, why)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"moe.num_experts": 7}, "7 experts on 2 ranks"),
        ({"parallel.ep_size": 4}, "tensor parallelism"),
        ({"parallel.all2all_backend": "deepep_low_latency"}, "deepep_low_latency"),
        ({"options.enable_dbo": True}, "dual-batch overlap"),
        ({"options.enable_elastic_ep": True}, "elastic"),
        ({"moe.is_lora_enabled": True}, "LoRA"),
    ],
)
def test_tokens_are_left_to_vllm_with_the_reason(
    change: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from farskip_fused.engines.vllm import expert_parallel, ranks

    monkeypatch.setattr(ranks, "_memory", "opened")
    monkeypatch.setattr(expert_parallel, "get_ep_group", lambda: None)
    parallel = SimpleNamespace(ep_size=2, dp_size=2, all2all_backend="allgather_reducescatter")
    moe: Any = SimpleNamespace(num_experts=8, is_lora_enabled=False, moe_parallel_config=parallel)
    options = SimpleNamespace(enable_dbo=False, enable_elastic_ep=False)
    config: Any = SimpleNamespace(parallel_config=options)
    assert expert_parallel._memory(moe, config) == "opened"
    for name, value in change.items():
        where, attribute = name.split(".")
        setattr({"moe": moe, "parallel": parallel, "options": options}[where], attribute, value)
    with pytest.raises(UsageError, match=sentence):
        expert_parallel._memory(moe, config)


def test_configuration_presents_the_stock_type_and_survives_copies() -> None:
    from farskip_fused.engines.configs import served

    config = served("deepseek_v3")(farskip={"version": 1}, hidden_size=64)
    for same in (config, pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert (same.model_type, same.hidden_size, same.farskip) == ("deepseek_v3", 64, {"version": 1})
        assert same.to_dict()["model_type"] == "farskip_deepseek_v3"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"parallel.pipeline_parallel_size": 2}, "pipeline"),
        ({"parallel.enable_dbo": True}, "--enable-dbo"),
        ({"parallel.use_sequence_parallel_moe": True}, "sequence-parallel"),
        ({"dtype": torch.float16}, "--dtype bfloat16"),
        ({"quant_config": object()}, "quantised"),
    ],
)
def test_what_does_not_run_is_refused_with_a_sentence(change: dict[str, Any], sentence: str) -> None:
    from farskip_fused.engines.vllm.models import check

    parallel = SimpleNamespace(pipeline_parallel_size=1, enable_dbo=False, use_sequence_parallel_moe=False)
    model = SimpleNamespace(hf_config=SimpleNamespace(routed_scaling_factor=2.5), dtype=torch.bfloat16)
    config: Any = SimpleNamespace(parallel_config=parallel, model_config=model, quant_config=None)
    check(config)
    for name, value in change.items():
        where = {"parallel": parallel, "dtype": model}.get(name.split(".")[0], config)
        setattr(where, name.split(".")[-1], value)
    with pytest.raises(UsageError, match=sentence):
        check(config)
