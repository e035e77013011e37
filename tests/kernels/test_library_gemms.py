import ctypes
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

import farskip_fused as ff
from farskip_fused.kernels import library_gemms
from farskip_fused.kernels.library_gemms import Busy
from farskip_fused.launch import run_ranks
from farskip_fused.symmetric.interface import join
from farskip_fused.symmetric.local import LocalMemory
from tests.layer_stack import CONNECTIVITIES, make_stack, outcome, random_problem, run_schedule
from tests.numerics import assert_close


@pytest.fixture
def told(monkeypatch):
    """(handle, target) of each call of a cuBLAS that is not there; ``told.handle`` is this thread's."""

    class Told(list):
        handle = 1

    told = Told()
    monkeypatch.setattr(library_gemms, "_sm_count_setter", lambda: lambda *call: told.append(call))
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: told.handle)
    monkeypatch.setattr(library_gemms, "_by_handle", {})
    return told


@pytest.fixture
def stream_calls(monkeypatch):
    """What is done with events, and which stream becomes the current one, in order."""
    calls = []

    class Event:
        def __init__(self, device):
            pass

        def record(self, stream="current"):
            calls.append(("record", stream))

        def wait(self, stream="current"):
            calls.append(("wait", stream))

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: calls.append(("set", stream)))
    return calls


@pytest.fixture
def memory(told, stream_calls):
    """On CPU, with a stand-in for the communication stream."""
    memory = LocalMemory(torch.device("cpu"), timeout=60.0)
    memory.stream = "communication"
    return memory


def test_what_is_launched_beside_follows_this_stream_and_is_awaited_where_it_is_joined(memory, stream_calls):
    with memory.beside():
        stream_calls.append("launch")
    mark = memory.mark(8)
    stream_calls.append("computation")
    join(mark)
    assert stream_calls == [
        ("record", "current"), ("wait", "communication"), ("set", "communication"), "launch", ("set", "current"),
        ("record", "communication"), "computation", ("wait", "current"),
    ]  # fmt: skip


def test_the_stream_is_this_one_again_after_a_launch_that_failed(memory, stream_calls):
    with pytest.raises(ValueError, match="no"), memory.beside():
        raise ValueError("no")
    assert stream_calls[-2:] == [("set", "communication"), ("set", "current")]


def test_gemms_leave_multiprocessors_until_all_that_travels_is_joined(memory, told):
    few, many, more = memory.mark(2), memory.mark(8), memory.mark(8)
    join(many)
    join(more)
    join(few)
    assert told == [(1, 130), (1, 124), (1, 130), (1, 0)]


def test_another_memory_does_not_end_what_one_has_under_way(memory, told):
    first, second = memory.mark(8), LocalMemory(torch.device("cpu"), timeout=60.0)
    second.stream = memory.stream
    join(second.mark(2))
    assert told == [(1, 124)]
    join(first)
    assert told == [(1, 124), (1, 0)]


def test_what_another_thread_joins_ends_where_it_began(memory, told):
    mark = memory.mark(8)
    told.handle = 2
    join(mark)
    assert told == [(1, 124), (1, 0)]


def test_what_nobody_will_join_any_more_takes_no_multiprocessors(memory, told):
    mark = memory.mark(8)
    del mark
    assert told == [(1, 124), (1, 0)]


def test_a_memory_that_does_not_tell_leaves_cublas_alone(memory, told):
    memory.tells_libraries = False
    join(memory.mark(8))
    assert told == []


def test_a_failure_of_cublas_is_a_warning(told, monkeypatch):
    monkeypatch.setattr(library_gemms, "_sm_count_setter", lambda: lambda handle, target: 7)
    with pytest.warns(UserWarning, match=r"cublasSetSmCountTarget\((124|0)\) failed with status 7"):
        Busy(8).end()


def test_without_a_cublas_of_its_own_there_is_nothing_to_tell(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    assert library_gemms._sm_count_setter.__wrapped__() is None


@pytest.mark.gpu
def test_cublas_makes_gemms_of_this_thread_for_the_multiprocessors_that_are_left():
    available = torch.cuda.get_device_properties(0).multi_processor_count
    x, w = torch.randn(2, 512, 512, device="cuda", dtype=torch.bfloat16).unbind()
    elsewhere = []
    busy = Busy(8)
    try:
        assert target() == available - 8
        assert_close(torch.nn.functional.linear(x, w), x.float() @ w.float().T, torch.bfloat16)
        thread = Thread(target=lambda: elsewhere.append(target()))
        thread.start()
        thread.join(60)
    finally:
        busy.end()
    assert target() == 0
    assert elsewhere == [0]


@pytest.mark.rung4
def test_after_a_pass_forward_and_backward_cublas_has_all_multiprocessors():
    assert run_ranks(targets_of_a_pass, 2, device="cuda", limit=240) == [(0, 0)] * 2


def targets_of_a_pass(memory: ff.SymmetricMemory) -> tuple[int, int]:
    """What cuBLAS is told of last, in this thread and in autograd's."""
    layers = make_stack([CONNECTIVITIES["farskip"]] * 2, True, memory, memory.device)
    memory.tells_libraries = True
    embedding, gradient = random_problem(memory.device)
    in_backward = []

    def run(layers, inputs):
        inputs.register_hook(lambda gradient: in_backward.append(target()))
        return run_schedule(layers, inputs)

    outcome(run, layers, embedding, gradient)
    memory.synchronize()
    return target(), in_backward[0]


def target() -> int:
    """What cuBLAS has been told in this thread; 0 for nothing."""
    library = ctypes.CDLL(f"libcublas.so.{torch.version.cuda.split('.')[0]}")
    found = ctypes.c_int(-1)
    assert library.cublasGetSmCountTarget(ctypes.c_void_p(torch.cuda.current_blas_handle()), ctypes.byref(found)) == 0
    return found.value
