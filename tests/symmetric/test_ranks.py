"""Dispatch and combine between ranks: over shared memory on CPU, over NVSHMEM on one GPU and on several."""

from types import SimpleNamespace

import pytest
import torch

from farskip_fused import launch
from farskip_fused.launch import RankFailed, run_ranks
from tests.rungs import CPU_IN_FULL, GPU_RUNGS, RUNGS, rotated
from tests.symmetric import rank_programs, soak


@pytest.mark.parametrize("device", RUNGS)
@pytest.mark.parametrize(
    ("world", "rounds", "options"),
    [
        pytest.param(2, 8, {}, id="2 ranks"),
        pytest.param(4, 4, {}, id="4 ranks"),
        pytest.param(2, 8, {"keep_received": False}, id="dispatched again", marks=pytest.mark.full),
        pytest.param(2, 8, {"combine": "presummed"}, id="presummed"),
    ],
)
def test_ranks_compute_what_one_rank_computes_under_skew(device, world, rounds, options):
    rounds = rounds if device == "cpu" else 10 * rounds
    outcomes = run_ranks(
        rank_programs.compare_with_world_of_one, world, rounds, torch.float32, 0.05, options,
        device=device, wait_timeout=60.0,
    )  # fmt: skip
    assert [outcome["rank"] for outcome in outcomes] == list(range(world))


def test_routing_that_many_programs_push_is_announced_once_all_of_it_is_there():
    run_ranks(rank_programs.compare_with_routing_in_blocks, 2, 3, torch.float32, 0.05, {}, wait_timeout=60.0)


@pytest.mark.timeout(900)  # on a busy machine the interpreter takes several times as long
@pytest.mark.parametrize("device", RUNGS)
def test_a_hundred_rounds_of_changing_shapes_stay_bitwise_equal(device):
    pairs = 25 if device == "cpu" else 250
    found = run_ranks(soak.soak, 2, 0, pairs, 1, 700.0, device=device, limit=800.0, wait_timeout=60.0)
    assert found == [pairs] * 2


@pytest.mark.parametrize("device", RUNGS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="kept"),
        pytest.param({"keep_received": False}, id="dispatched again", marks=pytest.mark.full),
    ],
)
def test_ranks_that_reach_each_other_by_puts_compute_the_same(device, options):
    rounds = 8 if device == "cpu" else 80
    run_ranks(
        rank_programs.compare_with_world_of_one, 2, rounds, torch.float32, 0.05, {**options, "combine": "presummed"},
        device=device, wait_timeout=60.0, by_put=True,
    )  # fmt: skip


@pytest.mark.rung4
@pytest.mark.parametrize("world", [8])
def test_eight_gpus_compute_what_one_does(world):
    run_ranks(
        rank_programs.compare_with_world_of_one, world, 40, torch.bfloat16, 0.01, {}, rank_programs.FOR_HOPPER,
        device="cuda", wait_timeout=30.0,
    )  # fmt: skip


@pytest.mark.parametrize("device", GPU_RUNGS)
@pytest.mark.parametrize("options", [{}, {"keep_received": False}, {"combine": "presummed"}], ids=str)
@pytest.mark.parametrize("shape", [rank_programs.SMALL, rank_programs.FOR_HOPPER], ids=["small", "for hopper"])
def test_low_precision_on_the_gpu(device, shape, options):
    run_ranks(
        rank_programs.compare_with_world_of_one, 2, 40, torch.bfloat16, 0.01, options, shape,
        device=device, wait_timeout=30.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("device", "world"),
    [
        pytest.param("cuda:0", 4, marks=pytest.mark.rung3),
        pytest.param("cuda", 2, marks=pytest.mark.rung4),
        pytest.param("cuda", 4, marks=pytest.mark.rung4),
    ],
)
@pytest.mark.parametrize("shape", [rank_programs.SMALL, rank_programs.FOR_HOPPER], ids=["small", "for hopper"])
def test_captured_passes_are_replayed_on_changing_inputs(device, world, shape):
    run_ranks(rank_programs.replay_graphs, world, 1000, torch.bfloat16, shape, device=device, wait_timeout=30.0)


@pytest.mark.parametrize("device", CPU_IN_FULL)
@pytest.mark.parametrize("phase", rank_programs.PHASES)
def test_a_peer_that_goes_silent_is_named_within_the_bound(device, phase):
    outcomes = run_ranks(
        rank_programs.lose_a_peer, 2, phase, False, device=device, wait_timeout=2.0, limit=240.0, may_fail=True
    )
    check_timeout(outcomes[0])


@pytest.mark.rung2
@pytest.mark.parametrize(
    "phase",
    [
        phase if phase in ("before experts", "before backward") else pytest.param(phase, marks=pytest.mark.full)
        for phase in rank_programs.PHASES
    ],
)
def test_a_killed_peer_is_named_within_the_bound(phase):
    outcomes = run_ranks(rank_programs.lose_a_peer, 2, phase, True, wait_timeout=2.0, limit=240.0, may_fail=True)
    check_timeout(outcomes[0])
    assert not outcomes[1].finished


def check_timeout(outcome):
    assert outcome.error is None, outcome.traceback
    message, seconds = outcome.result["message"], outcome.result["seconds"]
    assert message is not None, "the lost peer was not noticed"
    assert "Rank 0 waited 2 s for rank 1" in message
    assert all(word in message for word in ("phase", "epoch", "expected", "seen"))
    assert seconds < 2.0 + 5.0


@pytest.mark.parametrize("device", RUNGS)
def test_repeated_experts_beyond_capacity_are_named(device):
    messages = run_ranks(rank_programs.repeat_experts, 2, device=device, wait_timeout=5.0)
    assert "must differ from each other" in messages[1]
    assert messages[0] != "nothing was said"


@pytest.mark.parametrize("device", RUNGS)
def test_layers_that_differ_between_ranks_are_refused(device):
    for message in run_ranks(rank_programs.disagree, 2, device=device):
        assert "max_tokens=8" in message and "max_tokens=16" in message


@pytest.mark.parametrize(
    ("gpus", "device", "expected"),
    [(1, "cuda", [0, 0]), (2, "cuda", [0, 1]), (8, "cuda", [0, 1]), (2, "cuda:0", [0, 0]), (2, "cuda:1", [1, 1])],
)
def test_ranks_take_a_gpu_each_unless_there_are_too_few_or_one_is_named(monkeypatch, gpus, device, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert [launch.gpu_of(rank, 2, device) for rank in range(2)] == expected


@pytest.mark.parametrize(
    ("gpus", "expected"), [("0,1", ["0,1", "0,1", "0,1"]), ("4,5,6,7", ["4,5,6,7", "6,7,4,5", "4,5,6,7"]), ("3", ["3"])]
)
def test_lanes_of_tests_start_at_pairs_of_gpus_in_turn(gpus, expected):
    assert [rotated(gpus, lane) for lane in range(len(expected))] == expected


@pytest.mark.parametrize(("gpus", "expected"), [(1, 32), (4, 132)])
def test_ranks_have_their_share_of_one_gpu_or_all_of_their_own(monkeypatch, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    assert launch.multiprocessors_of_rank(4) == expected


@pytest.mark.rung2
def test_a_tensor_of_a_rank_comes_back_though_the_rank_is_gone():
    assert [part.tolist() for part in run_ranks(rank_programs.give_a_tensor, 2)] == [[0.0] * 1000, [1.0] * 1000]


@pytest.mark.rung2
def test_the_exception_of_a_rank_comes_back():
    with pytest.raises(RankFailed, match="Rank 0 of 2 raised ArithmeticError: of rank 0"):
        run_ranks(rank_programs.raise_an_error, 2)
