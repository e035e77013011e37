"""Triton for this machine: compiled where there is a GPU, interpreted where there is none."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.jit import JITFunction

if not torch.cuda.is_available():
    knobs.runtime.interpret = True

INTERPRETED: bool = knobs.runtime.interpret


def _interpret_standard_library() -> None:
    """Let interpreted kernels call ``tl.sum`` and its like.

    Triton decides at its own import whether its library is interpreted; torch or transformers may have imported it
    long before us, and asking every user to set an environment variable first is what we avoid here.
    """
    from triton.runtime.interpreter import InterpretedFunction

    for module in (tl.standard, tl):
        for name, function in list(vars(module).items()):
            if isinstance(function, JITFunction):
                setattr(module, name, InterpretedFunction(function.fn))


def _sort(block: tl.tensor) -> tl.tensor:
    """``tl.sort`` of a block, rising along its last dimension."""
    from triton.runtime.interpreter import TensorHandle

    return tl.tensor(TensorHandle(np.sort(block.handle.data), block.handle.dtype), block.type)


def _count_in_int32() -> None:
    """Triton 3.5's interpreter counts histograms in 64 bits under the name of 32, and stores eight bytes for four."""
    from triton.runtime.interpreter import InterpreterBuilder

    create_histogram = InterpreterBuilder.create_histogram

    def create_narrow_histogram(self, *arguments):
        counts = create_histogram(self, *arguments)
        counts.data = counts.data.astype(np.int32)
        return counts

    InterpreterBuilder.create_histogram = create_narrow_histogram


def _round_to_nearest() -> None:
    """Triton's interpreter cuts float32 off to bfloat16, and where rounding to e4m3 reaches the next power of two it
    drops the carry: 7.9 becomes 4.
    """
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(values, from_dtype, to_dtype, rounding_mode):
        for narrow, of_torch, bits in (
            (tl.bfloat16, torch.bfloat16, torch.uint16),
            (tl.float8e4nv, torch.float8_e4m3fn, torch.uint8),
        ):
            if from_dtype == tl.float32 and to_dtype == narrow:
                wide = torch.from_numpy(np.ascontiguousarray(values))
                return wide.to(of_torch).view(bits).numpy().reshape(values.shape)
        return convert(values, from_dtype, to_dtype, rounding_mode)

    interpreter._convert_float = convert_float


def _multiply_rows_alike() -> None:
    """Matrix products whose rows do not depend on where in a block they stand, as on a GPU.

    BLAS, which the interpreter calls, rounds the rows of a block differently on some processors; ranks that share out
    the rows of one expert would then differ from one rank in the last bit.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, *_):
        a_data, b_data = (side.data.astype(d.data.dtype) for side in (a, b))
        return TensorHandle(np.einsum("ij,jk->ik", a_data, b_data) + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def _patch_language_once() -> None:
    """Triton's interpreter changes its language anew for every call of a device function, a third of its time."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched: set[frozenset[int]] = set()

    class Kept:
        def restore(self) -> None:
            """Nothing compiles in this process, so the language may stay as it is."""

    def patch_once(function: Any) -> Kept:
        modules = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if modules not in patched:
            patch(function)
            patched.add(modules)
        return Kept()

    interpreter._patch_lang = patch_once


if INTERPRETED:
    _interpret_standard_library()
    _patch_language_once()
    _multiply_rows_alike()
    _count_in_int32()
    _round_to_nearest()
    # Triton's own takes the interpreter a second and a half for 1024 elements: it reduces by xor, one by one.
    tl.sort = _sort

    def nanoseconds() -> int:
        """A monotonic clock, callable inside an interpreted kernel; gives way to the process that is waited for."""
        time.sleep(0)
        return time.monotonic_ns()

else:
    from triton.language.extra.cuda import globaltimer

    @triton.jit
    def nanoseconds():
        return globaltimer()


# Triton's cdiv and next_power_of_2 serve its compiler, too, so that a call on the host costs some 5 us. An expert layer
# makes seven, and outside CUDA graphs a small one waits for the host.
def ceil_div(size: int, block: int) -> int:
    """Blocks that hold ``size`` elements."""
    return -(-size // block)


def padded(size: int) -> int:
    """The power of two that a Triton block of at least ``size`` elements needs."""
    return 1 << max(size - 1, 0).bit_length()


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous at an address divisible by 16; a copy where it is not.

    Triton compiles another variant of a kernel for other addresses, and loading it in the middle of a pass may have to
    wait for a kernel that waits for a peer.
    """
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
