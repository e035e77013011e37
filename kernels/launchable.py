"""Launches that cost the host a few microseconds, and kernels that are compiled before they are launched."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton.runtime import driver

from .machine import INTERPRETED

if TYPE_CHECKING:
    from farskip_fused._C import Launch

# What compiles each form, while launches are noted and not done: also those of autograd, in a thread of its own.
_noted: dict[Any, Callable[[], Any]] | None = None


class Kernel:
    """A Triton kernel, launched as ever: ``kernel[grid](*arguments, **constants)``; a decorator above ``jit``.

    Triton looks at every argument through a function that it generates, prints the options, and asks of each global
    constant whether it has changed: 10 to 40 us, where the launch itself takes 3. Outside CUDA graphs, as servers
    prefill, an expert layer then waits for the host. Here what decides the compiled form is a key of our own, and the
    form is launched as Triton's guides launch one that was compiled ahead: ``compiled[grid](*arguments)``.

    Arguments stand in the kernel's order, before all constants; constants and options (``num_warps``) are named.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.function[grid] if INTERPRETED else partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Any:
        """The compiled form that was launched; None where nothing was launched."""
        key = driver.active.get_current_device(), *map(_form, arguments), *constants.items()
        found, noted = self._compiled.get(key), _noted
        if noted is not None:
            if found is None:
                noted[self, key] = partial(self.function.warmup, *arguments, grid=grid, **constants)
            return None
        if found is not None:
            compiled, values = found
            compiled[(*grid, 1, 1)[:3]](*arguments, *values)
            return compiled
        parameters, named = self.function.params[: len(arguments)], self.function.params[len(arguments) :]
        # The key does not tell one constant among the arguments from another.
        assert not any(each.is_constexpr for each in parameters) and all(each.is_constexpr for each in named)
        compiled = self.function[grid](*arguments, **constants)
        if compiled is not None:  # a stand-in that only compiles returns nothing
            values = tuple(constants.get(parameter.name, parameter.default) for parameter in named)
            self._compiled[key] = compiled, values
        return compiled

    def of_one_form(self, **constants: Any) -> Callable[..., None]:
        """``launch(grid, *arguments, stream=None)`` with these constants, for arguments of one compiled form.

        Only the first launch looks at the arguments and goes through Triton: dtypes, addresses divisible by 16, what is
        None and what an integer fits must be the same in all, on one device, which is the current one; no grid is
        empty. Between a model's layers, where nothing is in the processor's caches, Triton's Python is most of what a
        launch costs (bench/NOTES.md). Its launch hooks do not see these launches.

        stream: torch's, None for the current one.
        """
        prepared: Launch | None = None
        device = 0

        def launch(grid: tuple[int, ...], *arguments: Any, stream: torch.cuda.Stream | None = None) -> None:
            nonlocal prepared, device
            if INTERPRETED:
                self.function[grid](*arguments, **constants)
            elif prepared is None or _noted is not None:
                with nullcontext() if stream is None else torch.cuda.stream(stream):
                    compiled = self._launch(grid, *arguments, **constants)
                if compiled is not None:
                    device, prepared = driver.active.get_current_device(), _prepared(compiled, len(arguments))
            else:
                handle = driver.active.get_current_stream(device) if stream is None else stream.cuda_stream
                prepared(handle, grid, *arguments)

        return launch


def _prepared(compiled: Any, arguments: int) -> Launch | None:
    """A compiled form that has been launched, with so many arguments before its constants.

    None where it wants more than arguments, as instrumented kernels do: scratch memory, or options of a launch.
    """
    from farskip_fused._C import Launch

    metadata = compiled.metadata
    names = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    if metadata.num_ctas > 1 or any(getattr(metadata, name) for name in names):
        return None
    types = [str(type_) for type_ in compiled.src.signature.values()][:arguments]
    return Launch(compiled.function, 32 * metadata.num_warps, metadata.shared, types)


def _form(argument: Any) -> Any:
    """All that Triton may compile another form for: at least what its own key says of the argument."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        fits = -(2**31) <= argument < 2**31, argument < 2**63
        return type(argument), argument == 1, argument % 16 == 0, *fits
    if argument is None or isinstance(argument, float):
        return type(argument)
    # A descriptor's layout follows from its kernel and the number of its dimensions.
    return argument.base.dtype, *argument.block_shape


def compile_ahead(launches: Callable[[], Any], device: torch.device, rank: int = 0, world: int = 1) -> bool:
    """Compile every form that ``launches`` launches, several at a time; nothing is launched, by no thread.

    Returns whether there is one that this process has not launched yet, and so not loaded.

    rank, world: of those on this host. They share the processors, and begin at different forms, so that they find in
    Triton's cache on disk what others have compiled. One by one, as they are launched, 250 forms take minutes.
    """
    global _noted
    noted: dict[Any, Callable[[], Any]] = {}
    _noted = noted
    try:
        launches()
    finally:
        _noted = None
    steps = list(noted.values())
    first = rank * len(steps) // world
    threads = max(len(os.sched_getaffinity(0)) // world, 1)
    pool = ThreadPoolExecutor(threads, initializer=torch.cuda.set_device, initargs=(device,))
    try:
        for compiled in [pool.submit(step) for step in steps[first:] + steps[:first]]:
            compiled.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return bool(steps)
