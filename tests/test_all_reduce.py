"""All-reduces give every rank the same bits: those of float32 sums in the order of ranks, rounded once."""

import time
from unittest.mock import Mock

import pytest
import torch

import farskip_fused as ff
from farskip_fused.all_reduce import PendingSum
from farskip_fused.kernels import protocol
from farskip_fused.kernels.all_reduce import Reducer
from farskip_fused.kernels.launchable import Kernel
from farskip_fused.launch import run_ranks
from tests.capture import capture
from tests.numerics import DEVICE
from tests.rungs import CPU_IN_FULL, GPU_RUNGS, RUNGS
from tests.symmetric.rank_programs import delay, vanish
from tests.symmetric.test_ranks import check_timeout

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make(memory, max_tokens=20, hidden=33, dtype=torch.float32, **options):
    all_reduce = ff.AllReduce(memory, max_tokens=max_tokens, hidden_size=hidden, dtype=dtype, **options)
    all_reduce.setup()
    return all_reduce


def addends(memory, tokens, hidden, dtype, seed):
    """Of every rank, and a residual; the same at every rank."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(memory.world + 1, tokens, hidden, generator=generator).to(memory.device, dtype)
    return drawn[:-1], drawn[-1]


def definition(parts, residual=None):
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    total = total.to(parts.dtype)
    return total if residual is None else residual + total


@pytest.mark.parametrize("two_shot", [False, True], ids=["one shot", "two shots"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_of_one_rank_is_its_addend_and_a_residual_is_added_as_a_separate_addition_is(dtype, two_shot):
    memory = ff.init(device=DEVICE)
    all_reduce = make(memory, dtype=dtype, one_shot_bytes=0 if two_shot else 2**20)
    for shape in ((20, 33), (0, 33), (2, 3, 33), (33,)):
        x, residual = torch.randn(2, *shape, device=DEVICE).to(dtype)
        assert torch.equal(all_reduce(x), x)
        assert torch.equal(all_reduce(x, residual=residual), residual + x)
    memory.synchronize()


def test_kernels_are_loaded_for_as_many_ranks_as_there_are(monkeypatch):
    lanes = []
    monkeypatch.setattr(Kernel, "of_one_form", lambda kernel, **constants: lanes.append(constants["LANES"]))
    monkeypatch.setattr("farskip_fused.all_reduce.PendingSum", lambda *launched: Mock())
    memory = ff.init(device=DEVICE)
    memory.world = 72
    ff.AllReduce(memory, max_tokens=20, hidden_size=33)._launch_all(ff.init(device=DEVICE))
    assert set(lanes) == {128}


def test_a_sum_is_started_on_the_communication_stream_once_that_follows_this_one(monkeypatch):
    calls = []

    def bound(kernel, **constants):
        return lambda *given, stream=None: calls.append((kernel.function.__name__, stream))

    monkeypatch.setattr(Kernel, "of_one_form", bound)
    memory = Mock(stream="communication")
    memory.follow = lambda: calls.append("follow")
    memory.mark = lambda programs: calls.append(("mark", programs))
    rows = torch.zeros(4, 32)
    slots = Mock(memory=memory, reducer=Reducer(torch.empty(0), 2, 1, 8, 64, 32, 4))
    PendingSum(slots, rows, two_shot=False).finish()
    assert calls == ["follow", ("_start_reduce", "communication"), ("mark", 1), ("_finish_reduce", None)]


def sum_under_skew(memory, rounds, max_tokens, hidden, dtype, worst_delay):
    """Rounds of either form by turns of size, two in flight; the second is started before the first is awaited."""
    of_half = max_tokens // 2 * hidden * dtype.itemsize
    all_reduce = make(memory, max_tokens, hidden, dtype, one_shot_bytes=of_half)
    torch.manual_seed(memory.rank)  # of the delays alone
    sizes = torch.Generator().manual_seed(1)
    wrong = torch.zeros((), dtype=torch.int64, device=memory.device)
    for round_ in range(0, rounds, 2):
        pending = []
        for seed in (round_, round_ + 1):
            drawn = int(torch.randint(0, max_tokens + 1, (), generator=sizes))
            tokens = (drawn, 0, max_tokens, 1)[seed % 4]
            parts, residual = addends(memory, tokens, hidden, dtype, seed)
            delay(memory, worst_delay)
            pending.append((all_reduce.start(parts[memory.rank].clone()), parts, residual if seed % 3 else None))
        for in_place, (started, parts, residual) in enumerate(pending):
            delay(memory, worst_delay)
            own = started._rows
            total = started.finish(residual=residual, in_place=bool(in_place))
            assert not total.numel() or (total.data_ptr() == own.data_ptr()) == bool(in_place)
            wrong += (total != definition(parts, residual)).any()
    memory.synchronize()
    assert int(wrong) == 0, f"rank {memory.rank}: {int(wrong)} sums differ"


@pytest.mark.parametrize("device", RUNGS)
@pytest.mark.parametrize(
    ("world", "hidden", "dtype"),
    [
        pytest.param(2, 33, torch.float16, id="2 ranks, odd rows"),
        pytest.param(3, 48, torch.bfloat16, id="3 ranks", marks=pytest.mark.full),
    ],
)
def test_every_rank_gets_the_bits_of_the_definition_under_skew(device, world, hidden, dtype):
    if device == "cpu":
        run_ranks(sum_under_skew, world, 8, 21, hidden, dtype, 0.05)
    else:
        run_ranks(sum_under_skew, world, 400, 500, hidden, dtype, 0.002, device=device, wait_timeout=30.0)


@pytest.mark.parametrize("device", GPU_RUNGS)
@pytest.mark.parametrize(
    ("world", "dtype"), [(2, torch.float32), (2, torch.float16), (2, torch.bfloat16), (4, torch.bfloat16)], ids=str
)
def test_messages_of_many_programs_are_summed(device, world, dtype):
    run_ranks(sum_under_skew, world, 60, 4096, 2048, dtype, 0.002, device=device, wait_timeout=30.0)


def replay(memory, replays, tokens, hidden, one_shot_bytes):
    """A captured pair of all-reduces in flight together, replayed on changing addends."""
    dtype = torch.bfloat16
    all_reduce = make(memory, tokens, hidden, dtype, one_shot_bytes=one_shot_bytes)
    first, second, residual = torch.zeros(3, tokens, hidden, dtype=dtype, device=memory.device)

    def call():
        pending = [all_reduce.start(first), all_reduce.start(second)]
        return pending[1].finish(residual=pending[0].finish(residual=residual))

    graph, found = capture(memory, call)
    wrong = torch.zeros((), dtype=torch.int64, device=memory.device)
    for seed in range(replays):
        parts = [addends(memory, tokens, hidden, dtype, 2 * seed + each) for each in range(2)]
        first.copy_(parts[0][0][memory.rank]), second.copy_(parts[1][0][memory.rank]), residual.copy_(parts[0][1])
        graph.replay()
        wrong += (found != definition(parts[1][0], definition(parts[0][0], residual))).any()
        if seed % 20 == 0:  # rounds outside of the graph go on with its epochs
            wrong += (all_reduce(first) != definition(parts[0][0])).any()
    memory.synchronize()
    assert int(wrong) == 0, f"rank {memory.rank}: {int(wrong)} sums differ under replay"


@pytest.mark.parametrize("device", GPU_RUNGS)
@pytest.mark.parametrize("one_shot_bytes", [0, 2**30], ids=["two shots", "one shot"])
@pytest.mark.parametrize(("tokens", "hidden"), [(3, 33), (1000, 2048)], ids=str)
def test_captured_all_reduces_are_replayed_on_changing_addends(device, one_shot_bytes, tokens, hidden):
    run_ranks(replay, 2, 200, tokens, hidden, one_shot_bytes, device=device, wait_timeout=30.0)


def lose_a_peer(memory, one_shot_bytes, phase, killed):
    """Rank 1 is lost at ``phase`` of the fourth round; says what the others see, and how long it took."""
    all_reduce = make(memory, one_shot_bytes=one_shot_bytes)
    x = torch.ones(20, 33, device=memory.device)
    for round_ in range(6):
        lost = round_ == 3 and memory.rank == 1
        start = time.monotonic()
        try:
            if lost and phase == "before start":
                vanish(memory, killed)
            pending = all_reduce.start(x)
            if lost and phase == "before finish":
                vanish(memory, killed)
            pending.finish()
            memory.synchronize()
        except ff.PeerTimeout as error:
            return {"message": str(error), "seconds": time.monotonic() - start}
    return {"message": None, "seconds": 0.0}


@pytest.mark.parametrize("device", CPU_IN_FULL)
@pytest.mark.parametrize("one_shot_bytes", [0, 2**20], ids=["two shots", "one shot"])
def test_a_peer_that_goes_silent_is_named_within_the_bound(device, one_shot_bytes):
    outcomes = run_ranks(
        lose_a_peer,
        2,
        one_shot_bytes,
        "before start",
        False,
        device=device,
        wait_timeout=2.0,
        limit=240.0,
        may_fail=True,
    )
    check_timeout(outcomes[0])


@pytest.mark.rung2
def test_a_peer_killed_while_its_slot_is_read_is_named_within_the_bound():
    # It never gives its credit: the next but one round waits for that.
    outcomes = run_ranks(lose_a_peer, 2, 2**20, "before finish", True, wait_timeout=2.0, limit=240.0, may_fail=True)
    check_timeout(outcomes[0])
    assert not outcomes[1].finished


def differ(memory):
    """What the ranks are told that give other numbers of tokens, and other sizes."""
    all_reduce, messages = make(memory), []
    for call in (
        lambda: all_reduce(torch.zeros(3 + memory.rank, 33, device=memory.device)),
        lambda: make(memory, max_tokens=8 * (memory.rank + 1)),
    ):
        try:
            call()
            memory.synchronize()
        except ff.UsageError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("device", RUNGS)
def test_ranks_that_disagree_are_told(device):
    for rank, (of_tokens, of_sizes) in enumerate(run_ranks(differ, 2, device=device, wait_timeout=5.0)):
        assert f"Rank {rank} gave {3 + rank} tokens" in of_tokens and f"rank {1 - rank} gave {4 - rank}" in of_tokens
        assert "max_tokens=8" in of_sizes and "max_tokens=16" in of_sizes


def test_peers_that_stores_do_not_reach_are_refused():
    memory = ff.init(device=DEVICE)
    memory.by_put = True
    with pytest.raises(ff.UsageError, match="reached by puts only"):
        ff.AllReduce(memory, max_tokens=4, hidden_size=4)


@pytest.fixture
def all_reduce():
    return make(ff.init(device=DEVICE))


def test_a_failed_context_gives_no_number(all_reduce):
    pending = all_reduce.start(torch.ones(4, 33, device=DEVICE))
    all_reduce._slots.context[protocol.FAILED.value] = 1  # as an expired wait leaves it, before the host looks
    assert torch.isnan(pending.finish()).all()


@pytest.mark.parametrize(
    ("x", "error", "sentence"),
    [
        (torch.zeros(4, 32), ff.UsageError, r"\[4, 32\] were given; \[\.\.\., 33\]"),
        (torch.zeros(()), ff.UsageError, r"\[\] were given"),
        (torch.zeros(4, 33).half(), TypeError, "float16 were given; the all-reduce is for torch.float32"),
        (torch.zeros(3, 7, 33), ff.UsageError, "21 tokens were given; max_tokens is 20"),
        (torch.zeros(4, 33).requires_grad_(), RuntimeError, "no gradient"),
    ],
)
def test_addends_that_do_not_fit_are_refused_in_one_sentence(all_reduce, x, error, sentence):
    x = x.to(DEVICE).detach().requires_grad_(x.requires_grad)
    with pytest.raises(error, match=sentence):
        all_reduce.start(x)
    assert not all_reduce._slots.open_rounds


def test_a_residual_that_does_not_fit_is_refused_and_the_round_goes_on(all_reduce):
    x = torch.ones(4, 33, device=DEVICE)
    pending = all_reduce.start(x)
    with pytest.raises(ff.UsageError, match=r"residual of \[3, 33\] was given; \[4, 33\]"):
        pending.finish(residual=x[1:])
    with pytest.raises(TypeError, match=r"residual of torch\.float16"):
        pending.finish(residual=x.half())
    assert torch.equal(pending.finish(residual=x), x + x)
    with pytest.raises(RuntimeError, match="called twice"):
        pending.finish()


def test_more_all_reduces_in_flight_than_slots_are_refused(all_reduce):
    x = torch.ones(4, 33, device=DEVICE)
    pending = [all_reduce.start(x), all_reduce.start(x)]
    with pytest.raises(RuntimeError, match="2 rounds in flight"):
        all_reduce.start(x)
    for started in pending:
        assert torch.equal(started.finish(), x)
    assert torch.equal(all_reduce(x), x)


@pytest.mark.parametrize(
    ("sizes", "error", "sentence"),
    [
        ({"max_tokens": 0}, ff.UsageError, "max_tokens is 0"),
        ({"hidden_size": 4.0}, TypeError, "hidden_size is 4.0"),
        ({"one_shot_bytes": -1}, ff.UsageError, "one_shot_bytes is -1"),
        ({"num_comm_sms": 0}, ff.UsageError, "num_comm_sms is 0"),
        ({"depth": 1}, ff.UsageError, "at least 2"),
        ({"dtype": torch.float64}, TypeError, "float64"),
    ],
)
def test_impossible_sizes_are_refused(sizes, error, sentence):
    with pytest.raises(error, match=sentence):
        ff.AllReduce(ff.init(device=DEVICE), **{"max_tokens": 4, "hidden_size": 4} | sizes)


def test_what_is_allocated_was_hinted_at_and_holds_the_largest_of_either_form(monkeypatch):
    memory = ff.init(device=DEVICE)
    all_reduce = ff.AllReduce(memory, max_tokens=100, hidden_size=64, one_shot_bytes=40 * 64 * 4)
    hint = all_reduce.size_hint()
    assert hint["total"] == sum(hint.values()) / 2
    assert hint["reduce_sums"] == 2 * 100 * 64 * 4
    assert all_reduce.shape.source_units(2) == 50 * 64 * 4 // 16  # half of a message in two shots
    assert all_reduce.shape.source_units(4) == 40 * 64 * 4 // 16  # a whole one in one shot
    with pytest.raises(RuntimeError, match=r"call setup\(\)"):
        all_reduce.start(torch.zeros(1, 64, device=DEVICE))
    allocated = []
    allocate = memory.allocate
    monkeypatch.setattr(memory, "allocate", lambda nbytes: allocated.append(nbytes) or allocate(nbytes))
    all_reduce.setup()
    assert allocated == [hint["total"]]
