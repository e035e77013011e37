"""What `farskip bench fused` counts, prints and refuses; its parts on CPU ranks."""

import json

import pytest
import torch

import farskip_fused as ff
from farskip_fused.bench import fused
from farskip_fused.bench.fused_ranks import LAYERS, PARTS, WAYS, Case, Measured, measure
from farskip_fused.bench.shapes import Shape, random_routing
from farskip_fused.cli import main
from farskip_fused.launch import run_ranks

CASE = Case(Shape(32, 16, 8, 2), 24, None)
FIELDS = {
    "shape", "ranks", "tokens", "link", "link_gigabytes_per_second", "part", "comm_sms", "gemm_sms", "comm_ms",
    "comm_spread_ms", "gemm_ms", "gemm_spread_ms", "unfused_ms", "unfused_spread_ms", "fused_ms", "fused_spread_ms",
    "link_ms", "ratio", "speedup", "bytes", "gigabytes_per_second", "comm_gigabytes_per_second", "difference",
}  # fmt: skip


def routed():
    """Rows and pairs that each of two ranks receives from the other, as the ranks draw their routing."""
    rows, pairs = [0, 0], [0, 0]
    for rank in range(2):
        torch.manual_seed(1 + rank)
        for _ in range(2):
            torch.randn(CASE.tokens, CASE.shape.hidden)
        index, _ = random_routing(CASE.shape, CASE.tokens, "cpu")
        away = index // 4 != rank
        rows[1 - rank] += int(away.any(1).sum())
        pairs[rank] += int(away.sum())  # of results, which come back
    return rows, pairs


@pytest.mark.full
@pytest.mark.rung2
def test_every_part_is_timed_every_way_and_fused_results_are_the_unfused_ones(tmp_path):
    rate = 1000
    measured = [one for (one,) in run_ranks(measure, 2, [CASE], rate, 2)]
    rows, pairs = routed()
    for rank, one in enumerate(measured):
        assert set(one.times) == set(PARTS) and all(set(ways) == set(WAYS) for ways in one.times.values())
        assert all(len(times) == 2 and min(times) > 0 for ways in one.times.values() for times in ways.values())
        assert set(one.differences) == set(LAYERS) and max(one.differences.values()) < 1e-5
        row = CASE.shape.hidden * 4
        assert one.received["dispatch + up"] == rows[rank] * row
        assert one.received["down + combine"] == pairs[rank] * row
        assert one.received["layer backward"] == (rows[rank] + pairs[rank]) * row
        assert one.link_ms["dispatch + up"] is None
        assert one.link_ms["down + combine"] == pytest.approx(pairs[1 - rank] * row / rate * 1e-3)
    table = fused.summary("tiny", CASE, "1", rate, measured)
    assert [row["part"] for row in table] == list(PARTS)
    assert all(set(row) == FIELDS for row in table)
    report = {"environment": {}, "failed": {}, "rows": table}
    fused.render(report)
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert json.loads((tmp_path / "report.json").read_text()) == report


def of(comm, gemm, unfused, fused_ms, link_ms=None, difference=0.0):
    ways = dict(zip(WAYS, (comm, gemm, unfused, fused_ms), strict=True))
    return Measured(
        {part: {way: [ms] * 5 for way, ms in ways.items()} for part in PARTS},
        dict.fromkeys(PARTS, 10**6), dict.fromkeys(PARTS, link_ms), dict.fromkeys(LAYERS, difference), 2, 31,
    )  # fmt: skip


def test_the_slowest_rank_counts_and_the_link_comes_on_top_of_the_sum(capsys):
    rows = fused.summary("tiny", CASE, "nvlink4", 112500, [of(1.0, 4.0, 8.0, 5.0, 2.0), of(3.0, 2.0, 10.0, 4.0, 3.0)])
    assert all(row["comm_ms"] == 6.0 and row["gemm_ms"] == 4.0 and row["link_ms"] == 3.0 for row in rows)
    assert all(row["ratio"] == 5 / 6 and row["speedup"] == 2.0 for row in rows)
    assert all(row["gigabytes_per_second"] == pytest.approx(0.2) for row in rows)
    assert rows[0]["link_gigabytes_per_second"] == 112.5 and rows[0]["difference"] is None
    fused.render({"environment": {}, "failed": {"tiny": "[why]"}, "rows": rows})
    printed = capsys.readouterr().out
    assert "tiny failed: [why]" in printed and "of no use" not in printed


@pytest.mark.parametrize("difference", [0.1, float("nan")])
def test_results_that_differ_are_said_to_be_of_no_use(capsys, difference):
    rows = fused.summary("tiny", CASE, "none", None, [of(1, 1, 1, 1), of(1, 1, 1, 1, difference=difference)])
    fused.render({"environment": {}, "failed": {}, "rows": rows})
    assert capsys.readouterr().out.count("of no use") == len(LAYERS)


def test_links_are_named_or_numbers():
    assert fused.parse_link("none") is None and fused.parse_link("nvlink4") == 450.0 and fused.parse_link("50") == 50.0
    for wrong in ("nvlink", "0", "-1", "nan", "inf"):
        with pytest.raises(ff.UsageError, match="Unknown link"):
            fused.parse_link(wrong)


def test_experts_that_do_not_divide_over_the_ranks_are_refused():
    with pytest.raises(ff.UsageError, match="8 experts, which do not divide over 3 ranks"):
        fused.run(["32,16,8,2"], [3], ["none"], [None], [16])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_refuses_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "fused"])
    assert leaving.value.code == 2
    assert "measures a CUDA GPU" in capsys.readouterr().err
