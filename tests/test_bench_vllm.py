"""What can be checked of the benchmark without a GPU."""

from __future__ import annotations

import itertools

import pytest

from farskip_fused import cli
from farskip_fused.bench import vllm_bench
from farskip_fused.engines.wiring import read_wirings


@pytest.mark.parametrize("model", vllm_bench.MODELS)
def test_variants_differ_in_the_wiring_alone(model: str) -> None:
    stock, kernels, farskip = (vllm_bench.config_of(model, variant) for variant in vllm_bench.VARIANTS)
    assert stock == kernels
    assert {name for name in farskip if farskip[name] != stock.get(name)} == {"model_type", "architectures", "farskip"}
    assert all(w.mlp_first for w in read_wirings(farskip["farskip"], [True] * vllm_bench.LAYERS))


def test_unknown_model_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["bench", "vllm", "gpt-2"])
    assert exit_code.value.code == 2
    assert "qwen3-30b-a3b or deepseek-v2-lite" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "rounds"), [(None, 5), (100.0, 5), (1.5, 3), (0.0, 2)])
def test_measuring_ends_with_the_rounds_that_fit(
    monkeypatch: pytest.MonkeyPatch, seconds: float | None, rounds: int
) -> None:
    class Engine:
        def elapsed(self, prompts: list[list[int]], tokens: int) -> float:
            return float(tokens)

    clock = itertools.count()  # a second between one look and the next, which is before a measured round
    monkeypatch.setattr(vllm_bench.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(vllm_bench, "POINTS", (vllm_bench.Point(1, 8), vllm_bench.Point(2, 4, 3)))
    times = vllm_bench._measure({"stock": Engine(), "farskip": Engine()}, 100, 5, seconds)  # type: ignore[dict-item]
    assert list(times.values()) == [
        {"stock": [milliseconds] * rounds, "farskip": [milliseconds] * rounds} for milliseconds in (1.0, 3.0)
    ]
