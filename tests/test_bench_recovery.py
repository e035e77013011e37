"""bench/recovery.py without its trainings: what it will do, goes on with, and says of results."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from farskip_fused.bench import recovery, recovery_report, suite
from farskip_fused.bench.recovery_subjects import FULL, TOY, build
from farskip_fused.errors import UsageError


@pytest.fixture
def bench(tmp_path):
    return recovery.Bench(tmp_path, TOY, torch.device("cpu"))


def test_the_full_size_is_what_was_asked_for():
    with torch.device("meta"):
        parameters = [sum(p.numel() for p in build(shape, FULL, 0).parameters()) for shape in recovery.SHAPES]
    assert parameters[0] >= 100_000_000
    assert parameters[1] < parameters[0]
    assert FULL.recovery_tokens == 5_000_000
    assert FULL.tasks >= 1000
    assert FULL.seeds == 3


def test_units_done_are_not_done_again_and_the_rest_waits_for_time(bench, tmp_path, monkeypatch):
    done = []

    def work(name):
        done.append(name)
        return {"kl": 1.0}

    names = [f"deepseek/{n}" for n in ("a", "b", "c")]
    monkeypatch.setattr(bench, "units", lambda: iter([(name, lambda name=name: work(name)) for name in names]))
    monkeypatch.setattr(bench, "_expected", lambda name: 1e9 if name.endswith("c") else 0.0)
    monkeypatch.setattr(recovery.time, "perf_counter", iter(range(100)).__next__)
    assert bench.run(20.0) == ["deepseek/c"]
    assert done == ["deepseek/a", "deepseek/b"]
    again = recovery.Bench(tmp_path, TOY, torch.device("cpu"))
    assert again.result("deepseek/b")["kl"] == 1.0
    with pytest.raises(UsageError, match="holds a run of other sizes"):
        recovery.Bench(tmp_path, FULL, torch.device("cpu"))


@pytest.mark.parametrize("left", [[], ["qwen/teacher"]])
def test_the_suites_call_writes_results_once_nothing_is_left(tmp_path, monkeypatch, left):
    (part,) = [one for one in suite.parts(1) if one.name == "recovery"]
    file = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["recovery", *part.command[2:], "--json", str(file), "--state", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(recovery, "write", lambda *_: None)
    monkeypatch.setattr(recovery.Bench, "run", lambda self, seconds: left)
    monkeypatch.setattr(recovery.Bench, "result", lambda self, name: {"kl": 1.0, "solved": [True]})
    recovery.main()
    assert file.exists() == (not left)
    if not left:
        report = json.loads(file.read_text())
        assert report["environment"]["torch"] == torch.__version__
        assert report["units"]["deepseek/fcsd-0"] == {"kl": 1.0}


def test_every_run_of_the_tables_is_a_unit(bench):
    names = [name for name, _ in bench.units()]
    assert len(names) == len(set(names))
    assert names[:2] == ["deepseek/teacher", "qwen/teacher"]
    wanted = ["fcsd-0", "fcsd-1", "sft-0", "kl+l2", "frozen-embeddings", "quarter-batch", "four-fold-batch", "control"]
    wanted += ["attention-only", "moe-only", "untrained-first-1", "untrained-last-75%", "untrained-all"]
    assert {f"deepseek/{name}" for name in wanted} <= set(names)


def test_paired_differences_count_tasks_that_only_one_solves():
    mean, half = recovery_report.paired([True, True, False, False] * 25, [True, False, True, False] * 25)
    assert mean == 0.0
    assert half == pytest.approx(1.96 * (0.5 * 100 / 99) ** 0.5 / 10)
    assert recovery_report.paired([True] * 9, [True] * 9) == (0.0, 0.0)


def test_the_document_says_whether_the_aims_are_met(tmp_path):
    def measured(kl, solved):
        return {
            "val_ce": 2.0,
            "kl": kl,
            "agreement": 0.9,
            "pass_at_1": sum(solved) / 200,
            "solved": solved,
            "tokens": 5,
        }

    all_but = [[index >= missed for index in range(200)] for missed in range(6)]
    teacher = measured(0.0, all_but[0]) | {"parameters": 10**8, "sources": {"standard library": 10**7}}
    del teacher["kl"], teacher["agreement"]
    results = {
        "deepseek/teacher": teacher, "deepseek/fcsd-0": measured(0.1, all_but[1]),
        "deepseek/fcsd-1": measured(0.1, all_but[5]), "deepseek/sft-0": measured(0.12, all_but[2]),
    }  # fmt: skip
    text = recovery_report.document(results, {"device": "somewhere", "torch": "2"})
    assert "FCSD's remaining KL is 0.83 of SFT's" in text
    assert text.count("not met") == 2
    results["deepseek/sft-0"]["kl"] = 0.2
    del results["deepseek/fcsd-1"]
    text = recovery_report.document(json.loads(json.dumps(results)), {"device": "somewhere", "torch": "2"})
    assert "| fcsd 0 | 0.0M | 2.0000 | 0.1000 | 90.0% | 99.5% | -0.5 ± 1.0 |" in text
    assert "not met" not in text
