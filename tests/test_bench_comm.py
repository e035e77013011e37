"""What `farskip bench comm` counts, prints and refuses; its steps on CPU ranks."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import farskip_fused as ff
from farskip_fused import mps
from farskip_fused.bench import all_to_all, collectives, comm
from farskip_fused.bench.comm_ranks import STEPS, Case, Measured, measure
from farskip_fused.bench.shapes import BYTES, Shape, random_routing
from farskip_fused.cli import main
from farskip_fused.launch import RankFailed, run_ranks

CASE = Case(Shape(32, 16, 8, 2), 24, 2)


@pytest.mark.full
@pytest.mark.rung2
def test_every_step_is_timed_on_every_rank_and_received_rows_are_counted():
    measured = run_ranks(measure, 2, [CASE], 3)
    for (one,), rows in zip(measured, expected_rows(), strict=True):
        assert one.rows == rows
        assert set(one.times) == set(STEPS) and all(len(times) == 3 for times in one.times.values())
        assert all(time > 0 for times in one.times.values() for time in times)


def expected_rows():
    """What each rank receives: one row for each token of any rank that has an expert there."""
    expected = [0, 0]
    for rank in range(2):
        torch.manual_seed(1 + rank)
        torch.randn(CASE.tokens, CASE.shape.hidden)
        index, _ = random_routing(CASE.shape, CASE.tokens, "cpu")
        for ids in index.tolist():
            for receiver in {expert // 4 for expert in ids}:
                expected[receiver] += 1
    return expected


@pytest.mark.full
@pytest.mark.rung2
def test_another_all_to_all_moves_the_same_rows_there_and_back():
    others = run_ranks(all_to_all.measure, 2, all_to_all.NCCL, [CASE], 3, symmetric=False)
    for ((other, captured),), rows in zip(others, expected_rows(), strict=True):
        assert other.rows == rows and not captured
        assert {step: len(times) for step, times in other.times.items()} == dict.fromkeys(all_to_all.STEPS, 3)


@pytest.mark.full
@pytest.mark.rung2
def test_an_all_to_all_that_is_wrong_or_not_there_is_left_out_with_the_reason():
    reasons = run_ranks(measure_what_cannot_be, 2, symmetric=False)
    assert reasons[0] == reasons[1]
    assert "does not bring back what was sent" in reasons[0][0]
    assert reasons[0][1] == "this torch has no NVSHMEM"


class Broken(all_to_all.Collective):
    def combine(self):
        return super().combine() * (dist.get_rank() + 1)


def measure_what_cannot_be(device):
    all_to_all.PEERS["broken"] = Broken
    return [all_to_all.measure(device, peer, [CASE], 3) for peer in ("broken", all_to_all.SYMMETRIC)]


def test_others_are_timed_once_for_any_number_of_multiprocessors_and_what_fails_is_noted(monkeypatch):
    asked = []

    def ranks(function, world, peer, cases, iterations, **options):
        asked.append((peer, cases))
        assert not options["symmetric"]
        if peer == all_to_all.SYMMETRIC:
            raise RankFailed("Rank 0 of 2 raised RuntimeError: no\ntraceback")
        return [
            [(Measured(dict.fromkeys(all_to_all.STEPS, [2.0] * 3), 5), rank == 0) for _ in cases] for rank in (0, 1)
        ]

    monkeypatch.setattr(collectives, "run_ranks", ranks)
    monkeypatch.setattr(all_to_all.importlib.util, "find_spec", lambda name: None)
    cases = [("name", replace(CASE, sms=sms)) for sms in (20, 8)]
    found, missing = all_to_all.compare(cases, 2, 3)
    assert asked == [(all_to_all.NCCL, [replace(CASE, sms=0)]), (all_to_all.SYMMETRIC, [replace(CASE, sms=0)])]
    assert [(one.peer, one.name, one.captured) for one in found] == [(all_to_all.NCCL, "name", False)]
    assert missing == {
        all_to_all.SYMMETRIC: "it failed: Rank 0 of 2 raised RuntimeError: no",
        all_to_all.DEEPEP: all_to_all.DEEPEP_MISSING,
    }


def test_another_is_set_against_the_fastest_of_ours(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    case = Case(Shape(2048, 1408, 64, 6), 4096, 20)
    rows = []
    for sms, ms in ((20, 2.0), (8, 4.0)):
        measured = Measured(dict.fromkeys(STEPS, [ms] * 3), 7)
        rows += comm.summary("deepseek-v2-lite", replace(case, sms=sms), 2, [measured] * 2, marked=False)
    other = Measured(dict.fromkeys(all_to_all.STEPS, [6.0] * 3), 7)
    rows += comm.summary("deepseek-v2-lite", replace(case, sms=0), 2, [other] * 2, by=all_to_all.NCCL, replayed=False)
    assert all(row["deepep_ms"] is None for row in rows)
    assert rows[-1]["sms"] is None and comm.fastest_of_ours(rows, rows[-1]) == 2.0
    assert comm.fastest_of_ours(rows, {**rows[-1], "sms": 8}) == 4.0
    comm.render({"environment": {}, "missing": {}, "rows": rows})
    assert "3.00x" in capsys.readouterr().out


def test_what_is_missing_is_said_once_unless_it_is_there_with_some_ranks():
    reasons = {"one": {"why": [2, 4]}, "other": {"this": [2], "that": [4]}, "third": {"why": [4]}}
    assert comm._worded(reasons, 2) == {
        "one": "why",
        "other": "with 2 ranks this; with 4 ranks that",
        "third": "with 4 ranks why",
    }


def test_ranks_of_one_gpu_have_pairs_of_multiprocessors():
    assert [mps.multiprocessors(132, ranks) for ranks in (1, 2, 4, 8)] == [132, 66, 32, 14]


def test_the_slowest_rank_of_each_iteration_counts():
    fast = Measured({step: [1.0, 3.0, 1.0, 1.0, 1.0] for step in STEPS}, 7)
    slow = Measured({step: [2.0, 1.0, 2.0, 2.0, 2.0] for step in STEPS}, 5)
    rows = comm.summary("deepseek-v2-lite", Case(Shape(2048, 1408, 64, 6), 4096, 20), 2, [fast, slow])
    assert [row["ms"] for row in rows] == [2.0] * len(STEPS)
    assert all(row["bytes"] == 7 * 2048 * BYTES for row in rows)
    marks = {row["step"]: row["deepep_ms"] for row in rows}
    assert marks["dispatch"] == 0.312 and marks["combine"] == 0.238
    comm.render({"environment": {}, "missing": {"DeepEP": "why"}, "rows": rows})


def test_experts_that_do_not_divide_over_the_ranks_are_refused():
    with pytest.raises(ff.UsageError, match="8 experts, which do not divide over 3 ranks"):
        comm.run(["32,16,8,2"], [3], [8], [16])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_refuses_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "comm"])
    assert leaving.value.code == 2
    assert "measures a CUDA GPU" in capsys.readouterr().err
