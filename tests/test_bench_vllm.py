"""What can be checked of the benchmark without a GPU."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from torch.autograd import DeviceType

from farskip_fused import cli
from farskip_fused.bench import vllm_bench
from farskip_fused.bench.vllm_gpu_time import GpuTime, busy_ms
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


@pytest.mark.parametrize(
    ("spans", "ms"),
    [
        pytest.param([], 0.0, id="none"),
        pytest.param([(5e3, 6e3), (1e3, 3e3)], 3.0, id="apart, in another order"),
        pytest.param([(0.0, 4e3), (1e3, 2e3), (3e3, 5e3)], 5.0, id="side by side"),
    ],
)
def test_a_gpu_is_busy_while_any_of_its_kernels_runs(spans: list[tuple[float, float]], ms: float) -> None:
    assert busy_ms(spans) == ms


def test_what_a_gpu_did_is_counted_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(device: DeviceType, begin: float, end: float, annotation: bool = False) -> SimpleNamespace:
        span = SimpleNamespace(start=begin, end=end)
        return SimpleNamespace(device_type=device, time_range=span, is_user_annotation=annotation)

    trace = Mock()
    trace.events.return_value = [
        event(DeviceType.CPU, 0.0, 9e3), event(DeviceType.CUDA, 1e3, 2e3), event(DeviceType.CUDA, 0.0, 8e3, True),
        event(DeviceType.CUDA, 4e3, 6e3),
    ]  # fmt: skip
    monkeypatch.setattr("torch.profiler.profile", lambda activities: trace)
    worker = GpuTime()
    worker.farskip_begin_trace()
    assert worker.farskip_busy_ms() == 3.0
    assert [call[0] for call in trace.method_calls] == ["start", "stop", "events"]


def test_a_table_of_busy_gpus_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    cell = {"model": "tiny", **vllm_bench.Point(2, 8)._asdict(), "rounds": 2}
    times = {name: {"ms": 4.0, "spread_ms": 0.0} for name in vllm_bench.VARIANTS}
    report = {"environment": {}, "ranks": 1, "layers": 8, "gpu_time": True, "points": [cell | {"variants": times}]}
    vllm_bench.render(report)
    printed = capsys.readouterr().out
    assert "ms: a GPU is busy" in printed
    assert "tokens/busy s" in printed


@pytest.mark.parametrize(("seconds", "rounds"), [(None, 5), (100.0, 5), (1.5, 3), (0.0, 2)])
def test_measuring_ends_with_the_rounds_that_fit(
    monkeypatch: pytest.MonkeyPatch, seconds: float | None, rounds: int
) -> None:
    class Engine:
        def ms_of(self, prompts: list[list[int]], tokens: int) -> float:
            return float(tokens)

    clock = itertools.count()  # a second between one look and the next, which is before a measured round
    monkeypatch.setattr(vllm_bench.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(vllm_bench, "POINTS", (vllm_bench.Point(1, 8), vllm_bench.Point(2, 4, 3)))
    times = vllm_bench._measure({"stock": Engine(), "farskip": Engine()}, 100, 5, seconds)  # type: ignore[dict-item]
    assert list(times.values()) == [
        {"stock": [milliseconds] * rounds, "farskip": [milliseconds] * rounds} for milliseconds in (1.0, 3.0)
    ]
