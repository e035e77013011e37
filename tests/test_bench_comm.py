"""What `farskip bench comm` counts, prints and refuses; its steps on CPU ranks."""

import pytest
import torch

import farskip_fused as ff
from farskip_fused.bench import comm
from farskip_fused.bench.comm_ranks import STEPS, Case, Measured, measure
from farskip_fused.bench.shapes import BYTES, Shape, random_routing
from farskip_fused.cli import main
from farskip_fused.launch import run_ranks

CASE = Case(Shape(32, 16, 8, 2), 24, 2)


@pytest.mark.rung2
def test_every_step_is_timed_on_every_rank_and_received_rows_are_counted():
    measured = run_ranks(measure, 2, [CASE], 3)
    expected = [0, 0]
    for rank in range(2):
        torch.manual_seed(1 + rank)
        torch.randn(CASE.tokens, CASE.shape.hidden)
        index, _ = random_routing(CASE.shape, CASE.tokens, "cpu")
        for ids in index.tolist():
            for receiver in {expert // 4 for expert in ids}:
                expected[receiver] += 1
    for (one,), rows in zip(measured, expected, strict=True):
        assert one.rows == rows
        assert set(one.times) == set(STEPS) and all(len(times) == 3 for times in one.times.values())
        assert all(time > 0 for times in one.times.values() for time in times)


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
