import ctypes
import gc
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

from farskip_fused.kernels import library_gemms
from farskip_fused.symmetric import interface
from farskip_fused.symmetric.interface import join
from farskip_fused.symmetric.local import LocalMemory


@pytest.fixture
def memory(monkeypatch):
    """On CPU, with a stand-in for the communication stream; ``memory.told`` lists what libraries were told."""
    memory = LocalMemory(torch.device("cpu"), timeout=60.0)
    memory.stream = SimpleNamespace(record_event=object)
    memory.told = []
    monkeypatch.setattr(interface, "leave_multiprocessors", memory.told.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_event=lambda event: None))
    return memory


def test_gemms_of_libraries_leave_multiprocessors_until_all_that_travels_is_joined(memory):
    few, many = memory.mark(2), memory.mark(8)
    join(many)
    join(few)
    assert memory.told == [2, 8, 2, 0]


def test_what_nobody_will_join_any_more_takes_no_multiprocessors(memory):
    mark = memory.mark(8)
    del mark
    gc.collect()
    memory.mark(2)
    assert memory.told == [8, 2]


def test_without_a_cublas_of_its_own_nothing_is_told(monkeypatch):
    monkeypatch.setattr(library_gemms, "_sm_count_setter", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", None)
    library_gemms.leave_multiprocessors(8)


def test_a_status_of_cublas_is_an_error(monkeypatch):
    monkeypatch.setattr(library_gemms, "_sm_count_setter", lambda: lambda handle, target: 7)
    monkeypatch.setattr(library_gemms, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 1)
    with pytest.raises(RuntimeError, match="124 multiprocessors failed with status 7"):
        library_gemms.leave_multiprocessors(8)


@pytest.mark.gpu
def test_cublas_makes_gemms_of_this_thread_for_the_multiprocessors_that_are_left():
    available = torch.cuda.get_device_properties(0).multi_processor_count
    x, w = torch.randn(2, 4096, 4096, device="cuda", dtype=torch.bfloat16).unbind()
    expected = torch.nn.functional.linear(x, w)
    elsewhere = []
    library_gemms.leave_multiprocessors(8)
    try:
        assert target() == available - 8
        torch.testing.assert_close(torch.nn.functional.linear(x, w), expected)
        thread = Thread(target=lambda: elsewhere.append(target()))
        thread.start()
        thread.join(60)
    finally:
        library_gemms.leave_multiprocessors(0)
    assert target() == 0
    assert elsewhere == [0]


def target() -> int:
    """What cuBLAS has been told in this thread; 0 for nothing."""
    library = ctypes.CDLL(f"libcublas.so.{torch.version.cuda.split('.')[0]}")
    found = ctypes.c_int(-1)
    assert library.cublasGetSmCountTarget(ctypes.c_void_p(torch.cuda.current_blas_handle()), ctypes.byref(found)) == 0
    return found.value
