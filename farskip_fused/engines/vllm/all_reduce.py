"""A sum over the ranks of tensor parallelism in two halves, as operators that torch.compile keeps in place.

Between ``start`` and ``finish`` the sum is under way and something else runs. A compiler that sees two operators
without a connection may move the second up to the first, which is correct and hides nothing, or the first down. So they
are tied by data flow: ``start`` declares that it changes what must come after it, and ``finish`` takes what must come
before it. Both declare that they change the addends: these must stay alive until they have left, and become the sum.

The sum is ``farskip_fused.AllReduce`` where its ranks reach each other's memory; elsewhere vLLM's own, which ends
before ``start`` returns. Experts that exchange tokens have begun theirs before: see ``leave``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context, is_forward_context_available

from farskip_fused.all_reduce import AllReduce
from farskip_fused.engines.vllm import ranks, settings

# Sums of both kinds are under way at once, in the same order on every rank.
ATTENTION, ROUTED = 0, 1

_library = torch.library.Library("farskip_fused", "FRAGMENT")
_library.define("all_reduce_start(Tensor(a!) value, Tensor(b!) before, int channel) -> ()")
_library.define("all_reduce_finish(Tensor(a!) value, Tensor after, int channel) -> ()")

_own: AllReduce | None = None
_under_way: dict[int, Callable[[], Tensor]] = {}
_left: set[int] = set()  # channels whose output was left under way before ``start``


def set_up(vllm_config: VllmConfig) -> None:
    """Chooses whose sum it is; collective, before the first ``start``. A second model's is the first one's."""
    global _own
    if _own is None:
        _own = ranks.ours_or_none(
            "FarSkip's sums over ranks", vllm_config, settings.ALL_REDUCE, lambda: _make(vllm_config)
        )


def _make(vllm_config: VllmConfig) -> AllReduce:
    model = vllm_config.model_config
    own = AllReduce(
        ranks.symmetric_memory(get_tp_group()),
        max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        hidden_size=model.get_hidden_size(),
        dtype=model.dtype,
    )
    own.setup()
    return own


def leave(wait: Callable[[], Tensor]) -> None:
    """Leaves the routed experts' output under way, which ``wait`` returns; ``start`` then has nothing to begin.

    Between the two no other output of routed experts is under way.
    """
    _under_way[ROUTED] = wait
    _left.add(ROUTED)


def start(value: Tensor, before: Tensor, channel: int) -> None:
    """Begins the sum of ``value`` over the ranks, which nobody may use before ``finish``.

    before: what the work that shall overlap it reads; unchanged. channel: ATTENTION or ROUTED.
    """
    torch.ops.farskip_fused.all_reduce_start(value, before, channel)


def finish(value: Tensor, after: Tensor, channel: int) -> None:
    """Waits until ``value``, given to ``start``, holds the sum. after: a result of the work that overlapped it."""
    torch.ops.farskip_fused.all_reduce_finish(value, after, channel)


def _start(value: Tensor, before: Tensor, channel: int) -> None:
    if channel in _left:
        _left.remove(channel)
        return
    if _own is None:
        _put(tensor_model_parallel_all_reduce(value), value)
        return
    pending = _own.start(value)
    if channel == ROUTED and _graph_ends_at_attention():
        pending.landed()
    _under_way[channel] = partial(pending.finish, in_place=True)


def _finish(value: Tensor, after: Tensor, channel: int) -> None:
    if channel in _under_way:
        _put(_under_way.pop(channel)(), value)


def _put(total: Tensor, value: Tensor) -> None:
    if total.data_ptr() != value.data_ptr():
        value.copy_(total)


def _graph_ends_at_attention() -> bool:
    """Whether a CUDA graph is captured that must not leave anything on another stream when attention comes."""
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return False
    return is_forward_context_available() and (get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE)


torch.library.impl(_library, "all_reduce_start", "CompositeExplicitAutograd")(_start)
torch.library.impl(_library, "all_reduce_finish", "CompositeExplicitAutograd")(_finish)
torch.library.register_fake("farskip_fused::all_reduce_start", lambda value, before, channel: None)
torch.library.register_fake("farskip_fused::all_reduce_finish", lambda value, after, channel: None)
