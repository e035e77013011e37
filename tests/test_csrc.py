"""The compiled extension: the status block, launches, the routing layout on the CPU, and residency on the GPU."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st

from farskip_fused import _C

WORDS = ("code", "rank", "peer", "phase", "epoch", "expected", "seen")


def words_of(status):
    return (ctypes.c_int64 * len(WORDS)).from_address(status.host_address)


class TestStatusBlock:
    def test_it_has_a_page_of_its_own(self):
        one, other = _C.StatusBlock(), _C.StatusBlock()
        assert one.address % mmap.PAGESIZE == 0
        assert one.address != other.address
        assert one.address == one.host_address

    def test_nothing_is_reported_until_the_code_is_written(self):
        status = _C.StatusBlock()
        assert status.read() is None
        words = words_of(status)
        words[1:] = [3, 2, 11, 2**40, 2**40, -1]
        assert status.read() is None
        words[0] = 1
        assert status.read() == dict(zip(WORDS, [1, 3, 2, 11, 2**40, 2**40, -1], strict=True))

    def test_clear_forgets_the_report(self):
        status = _C.StatusBlock()
        words_of(status)[:] = range(1, 8)
        status.clear()
        assert status.read() is None
        words_of(status)[0] = 2
        assert status.read() == {**dict.fromkeys(WORDS, 0), "code": 2}

    @pytest.mark.gpu
    def test_a_device_can_store_to_it(self):
        import torch

        torch.zeros(1, device="cuda")
        status = _C.StatusBlock()
        status.map_for_device()
        address = status.address
        status.map_for_device()
        assert status.address == address
        report = torch.arange(1, 8, device="cuda")
        copy = ctypes.CDLL("libcuda.so.1").cuMemcpyDtoD_v2
        copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t]
        assert copy(address, report.data_ptr(), report.nbytes) == 0
        torch.cuda.synchronize()
        assert status.read() == dict(zip(WORDS, range(1, 8), strict=True))

    def test_mapping_without_a_context_says_what_is_missing(self):
        import torch

        if torch.cuda.is_available() and torch.cuda.is_initialized():
            pytest.skip("this process has a CUDA context")
        with pytest.raises(RuntimeError, match="CUDA"):
            _C.StatusBlock().map_for_device()


# In place of libcuda: a launch is written down, one on stream 13 fails. The last pointers are Triton's scratch memory.
DRIVER = """
long long seen[16];
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  long long words[] = {(long long)function, gx, gy, gz, bx, by, bz, shared, (long long)stream,
                       *(long long*)parameters[0], *(int*)parameters[1], *(long long*)parameters[2],
                       *(long long*)parameters[3], *(long long*)parameters[4], extra != 0};
  for (int at = 0; at < 15; ++at) seen[at] = words[at];
  return stream == (void*)13 ? 700 : 0;
}
int cuGetErrorString(int result, const char** text) { *text = "an illegal address"; return 0; }
int cuCtxGetCurrent(void** context) { return 0; }
int cuMemHostRegister_v2(void* page, unsigned long bytes, unsigned flags) { return 0; }
int cuMemHostUnregister(void* page) { return 0; }
int cuMemHostGetDevicePointer_v2(unsigned long long* there, void* page, unsigned flags) { return 0; }
"""
LAUNCHES = """
import ctypes, importlib.util, sys
from types import SimpleNamespace

spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
launch = module.Launch(2**41, 512, 4096, ["*bf16", "constexpr", "i32", "i64"])
tensor = SimpleNamespace(data_ptr=lambda: 2**40 + 16)

def refusal(*arguments):
    try:
        launch(*arguments)
    except Exception as error:
        return type(error).__name__ + ": " + str(error)

launch(7, (5, 2), tensor, None, -3, 2**35)
print(list((ctypes.c_longlong * 15).in_dll(ctypes.CDLL("libcuda.so.1"), "seen")))
print(refusal(7, (5,), tensor, None, -3))
print(refusal(7, (5,), tensor, None, 2**31, 0))
print(refusal(7, (5,), tensor, None, 0, 2**63))
print(refusal(7, (5,), tensor, None, 0, 0.5))
print(refusal(7, (5,), None, None, 1, 0))
print(refusal(7, (5, 1, 1, 1), tensor, None, 1, 0))
print(refusal(7, (-1,), tensor, None, 1, 0))
print(refusal(13, (5,), tensor, None, 1, 0))
"""


class TestLaunch:
    def test_arguments_reach_the_driver_in_order_and_what_does_not_fit_is_refused(self, tmp_path):
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("needs a C compiler")
        (tmp_path / "driver.c").write_text(DRIVER)
        library = tmp_path / "libcuda.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
        folders = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("LD_LIBRARY_PATH"))))
        found = subprocess.run(
            [sys.executable, "-c", LAUNCHES, _C.__file__], env={**os.environ, "LD_LIBRARY_PATH": folders}, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        seen, *refusals = found.stdout.splitlines()
        assert json.loads(seen) == [2**41, 5, 2, 1, 512, 1, 1, 4096, 7, 2**40 + 16, -3, 2**35, 0, 0, 0]
        assert refusals == [
            "TypeError: The kernel takes 4 arguments and got 3.",
            "ValueError: An argument is 2147483648, which is no integer of 32 bits.",
            "ValueError: An argument is 9223372036854775808, which is no integer of 64 bits.",
            "ValueError: An argument is 0.5, which is no integer of 64 bits.",
            "AttributeError: 'NoneType' object has no attribute 'data_ptr'",
            "ValueError: A grid has three dimensions at most.",
            "ValueError: A grid's dimension is -1, which is no integer of 32 bits.",
            "RuntimeError: cuLaunchKernel failed: an illegal address.",
        ]

    def test_an_argument_that_no_launch_passes_is_refused(self):
        with pytest.raises(ValueError, match="An argument is of type fp32; a launch takes pointers, i32, i64"):
            _C.Launch(1, 32, 0, ["*i64", "fp32"])


class TestLayout:
    @given(
        st.data(),
        st.integers(1, 9),
        numpy_st.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=40),
        st.sampled_from([np.int32, np.int64]),
    )
    def test_it_agrees_with_numpy(self, data, num_experts, shape, dtype):
        experts = data.draw(numpy_st.arrays(dtype, shape, elements=st.integers(-1, num_experts - 1)))
        counts, order = _C.layout(experts, num_experts)
        flat = experts.reshape(-1)
        expected = np.argsort(flat, kind="stable")[np.count_nonzero(flat < 0) :]
        assert counts.dtype == order.dtype == np.int64
        np.testing.assert_array_equal(counts, np.bincount(flat[flat >= 0], minlength=num_experts))
        np.testing.assert_array_equal(order, expected)

    def test_it_reads_arrays_that_are_not_contiguous(self):
        experts = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.int64)
        counts, order = _C.layout(experts.T, 3)
        np.testing.assert_array_equal(counts, [2, 2, 2])
        np.testing.assert_array_equal(order, [0, 5, 2, 3, 1, 4])

    @pytest.mark.parametrize("wrong", [-2, 4, 2**31 - 1])
    def test_an_id_out_of_range_is_refused(self, wrong):
        with pytest.raises(ValueError, match=rf"Entry 3 has expert id {wrong}; ids must be from 0 to 3"):
            _C.layout(np.array([[0, 1], [2, wrong]], dtype=np.int32), 4)

    def test_another_dtype_is_refused(self):
        with pytest.raises(TypeError, match="float32; use int32 or int64"):
            _C.layout(np.zeros((2, 2), dtype=np.float32), 4)

    def test_no_experts_are_refused(self):
        with pytest.raises(ValueError, match="num_experts is 0"):
            _C.layout(np.zeros((2, 2), dtype=np.int32), 0)


@pytest.mark.skipif(not _C.has_cuda, reason="the extension was built without its CUDA part")
class TestHold:
    @pytest.mark.parametrize(("blocks", "microseconds"), [(0, 1), (-1, 1), (1, -1), (1, 10**9)])
    def test_sizes_out_of_range_are_refused(self, blocks, microseconds):
        with pytest.raises(ValueError, match="hold was asked for"):
            _C.hold(0, blocks, microseconds)

    @pytest.mark.gpu
    @pytest.mark.parametrize("exclusive", [False, True])
    def test_it_stays_for_as_long_as_it_was_told(self, exclusive):
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream()
        _C.hold(stream.cuda_stream, 1, 10, exclusive=exclusive)
        start.record()
        _C.hold(stream.cuda_stream, 4, 20_000, exclusive=exclusive)
        end.record()
        torch.cuda.synchronize()
        assert 19.5 < start.elapsed_time(end) < 60
