"""The compiled extension: the status block, the routing layout on the CPU, and residency on the GPU."""

from __future__ import annotations

import ctypes
import mmap

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
