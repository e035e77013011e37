"""Launches that cost the host a few microseconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from triton.runtime import driver

from .machine import INTERPRETED


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

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.function[grid] if INTERPRETED else partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        key = driver.active.get_current_device(), *map(_form, arguments), *constants.items()
        if (found := self._compiled.get(key)) is not None:
            compiled, values = found
            compiled[(*grid, 1, 1)[:3]](*arguments, *values)
            return
        parameters, named = self.function.params[: len(arguments)], self.function.params[len(arguments) :]
        # The key does not tell one constant among the arguments from another.
        assert not any(each.is_constexpr for each in parameters) and all(each.is_constexpr for each in named)
        compiled = self.function[grid](*arguments, **constants)
        if compiled is not None:  # a stand-in that only compiles returns nothing
            values = tuple(constants.get(parameter.name, parameter.default) for parameter in named)
            self._compiled[key] = compiled, values


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
