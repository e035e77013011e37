"""A sum over the ranks of tensor parallelism in two halves, as operators that torch.compile keeps in place.

Between ``start`` and ``finish`` the sum is under way and something else runs. A compiler that sees two operators
without a connection may move the second up to the first, which is correct and hides nothing, or the first down. So they
are tied by data flow: ``start`` declares that it changes what must come after it, and ``finish`` takes what must come
before it and declares that it changes the sum.

The sum itself is vLLM's own, which ends before ``start`` returns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce

# Sums of both kinds are under way at once, in the same order on every rank.
ATTENTION, ROUTED = 0, 1

_library = torch.library.Library("farskip_fused", "FRAGMENT")
_library.define("all_reduce_start(Tensor value, Tensor(a!) before, int channel) -> Tensor")
_library.define("all_reduce_finish(Tensor(a!) under_way, Tensor after, int channel) -> ()")


def start(value: Tensor, before: Tensor, channel: int) -> Tensor:
    """Begins the sum of ``value`` over the ranks and returns where it will be; nobody may read it before ``finish``.

    before: what the work that shall overlap it reads; unchanged. channel: ATTENTION or ROUTED.
    """
    return torch.ops.farskip_fused.all_reduce_start(value, before, channel)


def finish(under_way: Tensor, after: Tensor, channel: int) -> None:
    """Waits until ``under_way``, from ``start``, holds the sum. after: a result of the work that overlapped it."""
    torch.ops.farskip_fused.all_reduce_finish(under_way, after, channel)


def _start(value: Tensor, before: Tensor, channel: int) -> Tensor:
    total = tensor_model_parallel_all_reduce(value)
    # On CPU vLLM adds in place; an operator must not return its argument.
    return total.clone() if total.data_ptr() == value.data_ptr() else total


def _finish(under_way: Tensor, after: Tensor, channel: int) -> None:
    """The blocking sum has ended in ``_start``."""


torch.library.impl(_library, "all_reduce_start", "CompositeExplicitAutograd")(_start)
torch.library.impl(_library, "all_reduce_finish", "CompositeExplicitAutograd")(_finish)
torch.library.register_fake("farskip_fused::all_reduce_start", lambda value, before, channel: torch.empty_like(value))
torch.library.register_fake("farskip_fused::all_reduce_finish", lambda under_way, after, channel: None)
