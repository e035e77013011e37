"""What cuBLAS, which computes the dense layers, is told of our kernels on other streams.

cuBLAS chooses tiles that fill all multiprocessors in whole waves, or nearly. With a few busy such a GEMM needs a wave
more: 1.4 to 2 times as long beside 8 busy of 132. Chosen for 124 it takes 1.02 to 1.08 times as long as alone in three
of four shapes and 1.3 in the fourth, and 1.02 to 1.16 times where nothing runs beside it (bench/NOTES.md).

Source: ``cublasSetSmCountTarget`` in NVIDIA's cuBLAS documentation. Torch's own setting for this,
``torch._C._set_sm_carveout_experimental``, changes nothing for a plain ``linear`` (torch 2.11).
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from typing import Any

import torch


class Busy:
    """Multiprocessors that are not left, until ``end``, to the GEMMs that this thread launches on its device.

    cuBLAS may then choose another kernel, which adds in another order. GEMMs with a bias, which torch gives to
    cublasLt, are not told. Of several at once the largest counts: kernels between the ranks of one memory follow each
    other on one stream.
    """

    _told: _Told | None = None  # once it has ended, too

    def __init__(self, count: int) -> None:
        # It belongs to a device and a thread: autograd's has one of its own.
        handle = torch.cuda.current_blas_handle()
        if handle not in _by_handle:
            device = torch.cuda.get_device_properties(torch.cuda.current_device())
            _by_handle[handle] = _Told(handle, device.multi_processor_count)
        self._told, self._count = _by_handle[handle], count
        self._told.add(count)

    def end(self) -> None:
        if self._told is not None:
            told, self._told = self._told, None
            told.remove(self._count)

    __del__ = end  # nobody waits any more for what was under way when something failed


class _Told:
    """What cuBLAS has been told for one of its handles."""

    def __init__(self, handle: int, available: int) -> None:
        self._handle, self._available = handle, available
        self._counts: list[int] = []

    def add(self, count: int) -> None:
        largest = max(self._counts, default=0)
        self._counts.append(count)
        if count > largest:
            self._tell(count)

    def remove(self, count: int) -> None:
        self._counts.remove(count)
        largest = max(self._counts, default=0)
        if count > largest:
            self._tell(largest)

    def _tell(self, count: int) -> None:
        target, set_target = self._available - count if count else 0, _sm_count_setter()
        if set_target is not None and (status := set_target(self._handle, target)):
            warnings.warn(f"cublasSetSmCountTarget({target}) failed with status {status}.", stacklevel=2)


# By handle; torch never destroys one, and gives that of a thread that has ended to another.
_by_handle: dict[int, _Told] = {}


@cache
def _sm_count_setter() -> Any:
    """``cublasSetSmCountTarget`` of the cuBLAS that torch has loaded, as another copy would not know torch's handles;
    None where torch has no cuBLAS as a library of its own."""
    if torch.version.cuda is None:
        return None
    try:
        library = ctypes.CDLL(f"libcublas.so.{torch.version.cuda.split('.')[0]}", mode=os.RTLD_NOLOAD)
    except OSError:
        return None
    set_target = library.cublasSetSmCountTarget
    set_target.argtypes = (ctypes.c_void_p, ctypes.c_int)
    return set_target
