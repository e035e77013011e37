"""The benchmark of vLLM runs; on CPU, with a model of nearly nothing, whose times mean nothing."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from farskip_fused.bench import vllm_bench
from farskip_fused.bench.vllm_bench import Point

TINY = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": 8,
    "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_bench, "MODELS", {"tiny": vllm_bench.MODELS["qwen3-30b-a3b"] | TINY})
    monkeypatch.setattr(vllm_bench, "POINTS", (Point(1, 32), Point(2, 16, 4)))
    monkeypatch.setattr(vllm_bench, "KV_CACHE_BYTES", 2**28)
    monkeypatch.setattr(vllm_bench, "TOKENS_A_STEP", 128)
    monkeypatch.setattr(vllm_bench, "LONGEST_PROMPT", 64)
    monkeypatch.setattr(vllm_bench, "environment", dict)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)


@pytest.mark.timeout(600)
def test_every_variant_is_timed_at_every_point(tiny: None) -> None:
    report = vllm_bench.run(["tiny"], rounds=2)
    assert [(point["batch"], point["prompt"], point["new_tokens"]) for point in report["points"]] == [
        (1, 32, 0), (2, 16, 4),
    ]  # fmt: skip
    for point in report["points"]:
        assert set(point["variants"]) == set(vllm_bench.VARIANTS)
    assert all(timing["ms"] > 0 for timing in report["points"][0]["variants"].values())


@pytest.mark.timeout(600)
def test_without_a_gpu_none_is_busy(tiny: None) -> None:
    report = vllm_bench.run(["tiny"], rounds=2, gpu_time=True)
    assert [cell["ms"] for point in report["points"] for cell in point["variants"].values()] == [0.0] * 6


@pytest.mark.timeout(600)
def test_an_engine_that_does_not_start_is_named_with_its_traceback(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_bench, "TOKENS_A_STEP", -1)
    with pytest.raises(RuntimeError, match=r"(?s)The engine of tiny, stock failed:\nTraceback"):
        vllm_bench.run(["tiny"], rounds=2)
