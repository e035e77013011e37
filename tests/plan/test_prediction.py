"""What holds for any job: order of the times, overlap, bandwidth, no communication on one rank."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from farskip_fused.errors import UsageError
from farskip_fused.plan import CLUSTERS, MODELS, PHASES, PRECISIONS, TRANSPORTS, Job, predict, recommendation
from farskip_fused.plan.clusters import scaled
from farskip_fused.plan.durations import backward_durations, exchange, forward_durations
from farskip_fused.plan.prediction import predict_once, timelines, window
from farskip_fused.plan.splits import frontier, parse_swept, sweep

TOLERANCE = 1e-6
ROOMY = [replace(cluster, capacity=1e5) for cluster in CLUSTERS.values()]  # memory is tested elsewhere


@st.composite
def jobs(draw, **fixed):
    phase, tp = draw(st.sampled_from(PHASES)), draw(st.sampled_from([1, 1, 2, 8]))
    wanted = {
        "model": draw(st.sampled_from(sorted(MODELS))), "cluster": draw(st.sampled_from(ROOMY)),
        "ep": draw(st.sampled_from([1, 2, 8, 16, 32, 64])), "tp": tp, "dp": draw(st.sampled_from([None, 1, 64])),
        "sequence": draw(st.sampled_from([128, 2048, 16384])), "batch": draw(st.sampled_from([1, 8, 64])),
        "phase": phase, "precision": draw(st.sampled_from(PRECISIONS)), "depth": draw(st.sampled_from([1, 1, 2, 3])),
        "transport": draw(st.sampled_from(sorted(TRANSPORTS))), "skew": draw(st.sampled_from([0.0, 0.5])),
    }  # fmt: skip
    try:
        return Job(**(wanted | fixed))
    except UsageError:
        assume(False)


@settings(deadline=None, max_examples=40)
@given(jobs())
def test_times_are_in_order_and_overlap_is_a_share(job):
    prediction = predict(job)
    for one in prediction.directions:
        assert one.blocking >= one.standard - TOLERANCE
        # The fused transport chooses its form of combine for the whole stack, which may cost a layer a little.
        assert one.standard >= one.farskip * (1 - 1e-3 * (job.transport == "fused")) - TOLERANCE
        assert one.farskip >= one.compute - TOLERANCE
        assert -TOLERANCE <= one.idle <= one.exposed + TOLERANCE
        assert one.overlap is None or -TOLERANCE <= one.overlap <= 1 + TOLERANCE
    assert prediction.low <= prediction.gain <= prediction.high
    # A step has the ends of the stack too, where a deeper order has more to fill and to drain.
    assert prediction.speedup >= prediction.gain * (1 - 1e-3)
    assert prediction.gain >= 1 - (1e-3 if job.depth == 1 else 2e-2)
    assert recommendation(prediction).startswith(("Convert: ", "Measure first: ", "Not worth it"))


@settings(deadline=None, max_examples=40)
@given(jobs(), st.floats(1.0, 10.0))
def test_more_bandwidth_is_never_slower(job, factor):
    faster = replace(job, cluster=scaled(job.machines, links=factor))
    slow, fast = (predict_once(one).step for one in (job, faster))
    for name, time_taken in slow.items():
        assert fast[name] <= time_taken + TOLERANCE


@settings(deadline=None, max_examples=40)
@given(jobs(), st.floats(1.0, 4.0))
def test_faster_computation_is_never_slower(job, factor):
    faster = replace(job, cluster=scaled(job.machines, compute=factor))
    slow, fast = (predict_once(one).step for one in (job, faster))
    for name, time_taken in slow.items():
        assert fast[name] <= time_taken + TOLERANCE


@settings(deadline=None, max_examples=40)
@given(jobs(ep=1, tp=1))
def test_one_expert_parallel_rank_has_no_communication(job):
    assert exchange(job, False, False) == exchange(job, False, True) == 0
    prediction = predict(job)
    assert prediction.overlap is None and prediction.gain == pytest.approx(1)
    assert recommendation(prediction).startswith("Not worth it: there is no communication")


@settings(deadline=None, max_examples=40)
@given(jobs(transport="streams"))
def test_a_row_for_each_rank_needs_no_more_link_time_than_one_for_each_expert(job):
    plain = replace(job, transport="all-to-all")
    for name, moved in forward_durations(job).transfers.items():
        assert moved <= forward_durations(plain).transfers[name] + TOLERANCE


@settings(deadline=None, max_examples=40)
@given(jobs(elementwise="fused"))
def test_separate_elementwise_operations_make_no_action_faster(job):
    for durations in (forward_durations, backward_durations):
        separate = durations(replace(job, elementwise="separate")).actions
        for name, time_taken in durations(job).actions.items():
            assert separate[name] >= time_taken - TOLERANCE


def test_a_transfer_that_waits_for_its_multiprocessors_hides_less():
    late = Job("qwen3-30b-a3b", "h200-ib400", ep=16)
    prompt = replace(late, cluster=replace(late.machines, late=0.0))
    assert predict(late).forward.farskip > 1.05 * predict(prompt).forward.farskip
    assert predict(late).forward.blocking == predict(prompt).forward.blocking


def test_fused_kernels_widen_the_window_by_the_experts():
    job = Job("deepseek-v3", "h200-ib400", ep=64, dp=256)
    streams, fused = predict(job), predict(replace(job, transport="fused"))
    assert window(fused.job)[1] > window(job)[1]
    assert fused.forward.farskip < streams.forward.farskip


@pytest.mark.parametrize(("ep", "taken", "unused"), [(8, "fused_share", "put_share"), (16, "put_share", "fused_share")])
def test_fused_kernels_put_between_nodes_on_a_share_of_their_own_and_send_sums_alone(ep, taken, unused):
    job = Job("qwen3-30b-a3b", "h200-ib400", ep=ep, dp=64, transport="fused")
    forms = {
        durations.early_combine for backward in (False, True) for durations, _ in timelines(job, backward).values()
    }
    assert (True in forms) == (ep == 8)

    def farskip(**shares):
        return predict_once(replace(job, cluster=replace(job.machines, **shares))).forward.farskip

    assert farskip(**{taken: 0.3}) > farskip()
    assert farskip(**{unused: 0.3}) == farskip()


def test_depth_helps_where_the_window_is_too_small():
    job = Job("qwen3-30b-a3b", "h200-ib400", ep=32, dp=64)
    times = [predict(replace(job, depth=depth)).forward.farskip for depth in (1, 2, 3)]
    assert times[0] > times[1] > times[2] - TOLERANCE


def test_a_slower_network_makes_conversion_worth_more():
    fast, slow = (predict(Job("deepseek-v2-lite", name, ep=16)) for name in ("h200-ib400", "h200-ib200"))
    assert slow.gain > fast.gain
    assert recommendation(slow).startswith("Convert")


def test_recommendation_names_the_expert_parallelism_from_which_it_pays():
    assert "from EP 2" in recommendation(
        predict(Job("mixtral-8x7b", "h200-ib200", ep=1, phase="prefill", sequence=512))
    )


def test_a_sweep_keeps_tokens_a_gpu_and_finds_the_fastest():
    job = Job("qwen3-30b-a3b", "h200-ib400", ep=8, batch=4)
    found = sweep(job)
    assert {one.job.gpus for one in found.predictions} == {8}
    assert {one.job.replica_tokens / one.job.tp for one in found.predictions} == {4 * 4096}
    rates = [one.tokens_per_second for one in found.predictions]
    assert rates == sorted(rates, reverse=True) and found.best("farskip") is found.predictions[0]
    assert max(rate for _, rate in frontier(found.predictions, "farskip")) == rates[0]
    assert all("does not fit" in why or "key-value" in why for why in found.refused.values())


def test_sweeps_that_are_refused():
    with pytest.raises(UsageError, match="use ep or tp or ep,tp"):
        parse_swept("ep,pp")
    # Powers of two do not divide 5 GPUs, and the model does not fit on one.
    with pytest.raises(UsageError, match="No split of 5 GPUs is possible: "):
        sweep(Job("deepseek-v2", "mi300x-400", ep=5, phase="prefill"))


def test_a_plan_is_quick_and_needs_no_torch():
    program = (
        "import sys, time\n"
        "from farskip_fused.cli import app\n"
        "app(['plan', 'deepseek-v3', '--ep', '64', '--dp', '256', '--cluster', 'h200-ib400'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
        "assert time.process_time() < 2, time.process_time()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)


def test_a_full_sweep_takes_less_than_a_minute():
    start = time.process_time()
    sweep(Job("deepseek-v3", "h200-ib400", ep=256, dp=1024))
    assert time.process_time() - start < 60
