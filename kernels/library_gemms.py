"""What cuBLAS, which computes the dense layers, is told of our kernels on other streams.

A GEMM made for all multiprocessors has as many tiles as they take in one wave, or in a whole number of them. With a few
of them busy it needs one wave more: 1.3 to 1.9 times as long beside 8 busy of 132, where a GEMM that cuBLAS has chosen
for 124 takes at most 1.1 times as long as one on the whole GPU, mostly (shapes are in bench/NOTES.md).

Source: ``cublasSetSmCountTarget`` in NVIDIA's cuBLAS documentation. Torch's own setting for this,
``torch._C._set_sm_carveout_experimental``, changes nothing for a plain ``linear`` (torch 2.11).
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

import torch


def leave_multiprocessors(count: int) -> None:
    """Let the GEMMs that this thread launches on its device from now on be made for all multiprocessors but ``count``.

    cuBLAS may then choose another kernel, which adds in another order. GEMMs with a bias, which torch gives to
    cublasLt, are not told.
    """
    set_target = _sm_count_setter()
    if set_target is None:
        return
    target = _multiprocessors(torch.cuda.current_device()) - count if count else 0
    # A handle belongs to a device and a thread: autograd's has one of its own.
    if status := set_target(torch.cuda.current_blas_handle(), target):
        raise RuntimeError(f"cublasSetSmCountTarget for {target} multiprocessors failed with status {status}.")


@cache
def _multiprocessors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@cache
def _sm_count_setter() -> Any:
    """Of the cuBLAS that torch has loaded, whose handles another copy would not know; None if it is not a library of
    its own."""
    if torch.version.cuda is None:
        return None
    try:
        library = ctypes.CDLL(f"libcublas.so.{torch.version.cuda.split('.')[0]}", mode=os.RTLD_NOLOAD)
    except OSError:
        return None
    set_target = library.cublasSetSmCountTarget
    set_target.argtypes = (ctypes.c_void_p, ctypes.c_int)
    return set_target
