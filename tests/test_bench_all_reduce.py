"""What `farskip bench all-reduce` counts, prints and refuses; its all-reduces on CPU ranks."""

import pytest
import torch
import torch.distributed as dist

from farskip_fused.all_reduce import ANY_MESSAGE, largest_in_one_shot
from farskip_fused.bench import all_reduce, all_reduce_ranks
from farskip_fused.bench.all_reduce_ranks import FORMS, LARGEST_ONE_SHOT, NCCL, ONE_SHOT, TWO_SHOTS, Case, Measured
from farskip_fused.cli import main
from farskip_fused.launch import run_ranks

CASES = [Case(3, 40, 2), Case(7, 40, 2)]


@pytest.mark.full
@pytest.mark.rung2
def test_both_forms_are_timed_on_every_rank():
    for measured in run_ranks(all_reduce_ranks.measure, 2, CASES, 3):
        for one in measured:
            assert set(one.times) == set(FORMS) and not one.captured
            assert all(len(times) == 3 and min(times) > 0 for times in one.times.values())


@pytest.mark.full
@pytest.mark.rung2
def test_others_are_timed_if_they_are_right_and_left_out_with_the_reason_if_not():
    for right, wrong, absent in run_ranks(measure_others, 2, symmetric=False):
        assert [len(one.times[""]) for one in right] == [3, 3]
        assert wrong == "it does not give the sum of what all ranks have"
        assert absent == "torch's symmetric memory needs GPUs"


def measure_others(device):
    def make_broken(device, case, group):
        return {"": (lambda addends: addends + dist.get_rank(), torch.empty(case.tokens, case.hidden))}

    all_reduce_ranks.OTHERS["broken"] = make_broken
    return [
        all_reduce_ranks.measure_other(device, name, CASES, 3) for name in (NCCL, "broken", all_reduce_ranks.SYMMETRIC)
    ]


def rows_of(times, by=all_reduce.OURS, tokens=1024):
    measured = [Measured({form: [ms, ms, ms] for form, ms in times.items()}, True)] * 2
    return all_reduce.summary(Case(tokens, 2048, 8 if by == all_reduce.OURS else 0), measured, by=by)


def test_the_slowest_rank_counts_and_others_are_set_against_our_faster_form(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    fast, slow = Measured({"": [1.0, 3.0, 1.0]}, True), Measured({"": [2.0, 1.0, 2.0]}, False)
    (row,) = all_reduce.summary(Case(1024, 2048, 0), [fast, slow], by=NCCL)
    assert row["ms"] == 2.0 and not row["replayed"] and row["bytes"] == 2**22 and row["sms"] is None
    assert row["gigabytes_per_second"] == pytest.approx(2**22 * 1e-9 / 2e-3)
    rows = [*rows_of({ONE_SHOT: 4.0, TWO_SHOTS: 1.0}), row]
    all_reduce.render({"environment": {}, "missing": {"one": "why"}, "rows": rows, "crossings": []})
    printed = capsys.readouterr().out
    assert "2.00x" in printed and "one is left out: why" in printed and f"{NCCL}, without a graph" in printed


def test_two_shots_are_faster_from_the_size_after_the_last_that_was_not(capsys):
    rows = []
    for tokens, times in (
        (1, {ONE_SHOT: 2.0, TWO_SHOTS: 1.0}),
        (8, {ONE_SHOT: 1.0, TWO_SHOTS: 1.5}),
        (64, {ONE_SHOT: 3.0, TWO_SHOTS: 2.0}),
        (512, {ONE_SHOT: 9.0, TWO_SHOTS: 4.0}),
        (8192, {TWO_SHOTS: 20.0}),
    ):
        rows += rows_of(times, tokens=tokens)
    (crossing,) = all_reduce.crossings(rows)
    assert crossing == {"ranks": 2, "sms": 8, "two_shots_faster_from_bytes": 64 * 4096, "threshold_bytes": ANY_MESSAGE}
    (never,) = all_reduce.crossings(rows_of({ONE_SHOT: 1.0, TWO_SHOTS: 1.0}))
    assert never["two_shots_faster_from_bytes"] is None
    of_four = crossing | {"ranks": 4, "threshold_bytes": largest_in_one_shot(4)}
    all_reduce.render({"environment": {}, "missing": {}, "rows": [], "crossings": [crossing, never, of_four]})
    printed = " ".join(capsys.readouterr().out.split())
    assert "faster from 256 KiB on" in printed and "one shot carries any message" in printed
    assert "one shot carries up to 512 KiB" in printed
    assert "at no size that was timed in both forms" in printed


def test_large_messages_are_not_timed_in_one_shot():
    tokens = LARGEST_ONE_SHOT // 4096
    assert Case(tokens, 2048, 8).has(ONE_SHOT) and not Case(tokens + 1, 2048, 8).has(ONE_SHOT)
    assert Case(tokens + 1, 2048, 8).has(TWO_SHOTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_refuses_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "all-reduce"])
    assert leaving.value.code == 2
    assert "measures a CUDA GPU" in capsys.readouterr().err
