"""What the expert layers refuse at the door: sizes, weights, hidden states and routing that do not fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from farskip_fused.errors import UsageError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """TypeError or UsageError unless it is one, and at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; an integer is needed.")
    if value < least:
        raise UsageError(f"{name} is {value}; it must be at least {least}.")


def check_sizes(sizes: Mapping[str, int], world: int, dtype: torch.dtype) -> None:
    """TypeError or UsageError unless the sizes, by their names, make a layer whose experts divide over the ranks."""
    for name, value in sizes.items():
        check_integer(name, value)
    num_experts, top_k = sizes["num_experts"], sizes["top_k"]
    if top_k > num_experts:
        raise UsageError(f"top_k is {top_k} and there are only {num_experts} experts; lower top_k.")
    if num_experts % world:
        raise UsageError(f"{num_experts} experts do not divide over {world} ranks; choose a world size that does.")
    if dtype not in DTYPES:
        raise TypeError(f"The experts' dtype is {dtype}; use bfloat16, float16 or float32.")


def check_tensor(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor, owner: str) -> None:
    """UsageError or TypeError unless it has that shape, and the dtype and device of ``like``, which is of ``owner``."""
    if tensor.shape != tuple(shape):
        raise UsageError(f"{name} of {list(tensor.shape)} was given; {list(shape)} is needed.")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} of {tensor.dtype} was given; {owner} is for {like.dtype}.")
    if tensor.device != like.device:
        raise UsageError(f"{name} is on {tensor.device}, {owner} on {like.device}.")


def check_experts(w13: Tensor, w2: Tensor, transposed: bool) -> None:
    """UsageError or TypeError unless the two are contiguous weights of one set of experts."""
    hidden_dim = 1 if transposed else 2
    fits = w13.dim() == w2.dim() == 3 and w13.shape[3 - hidden_dim] == 2 * w2.shape[hidden_dim]
    if not fits or w13.shape[0] != w2.shape[0] or w13.shape[hidden_dim] != w2.shape[3 - hidden_dim]:
        needed = "[E, H, 2I] and [E, I, H]" if transposed else "[E, 2I, H] and [E, H, I]"
        raise UsageError(f"w13 {list(w13.shape)} and w2 {list(w2.shape)} were given; they must be {needed}.")
    if w13.dtype != w2.dtype or w13.dtype not in DTYPES:
        raise TypeError(
            f"w13 of {w13.dtype} and w2 of {w2.dtype} were given; both must be bfloat16, float16 or float32."
        )
    if w13.device != w2.device:
        raise UsageError(f"w13 is on {w13.device} and w2 on {w2.device}; move one of them.")
    for name, weight in (("w13", w13), ("w2", w2)):
        if not weight.is_contiguous():
            raise UsageError(f"{name} must be contiguous; assign a clone of it.")


def check_hidden_states(hidden_states: Tensor, hidden_size: int, weight: Tensor) -> None:
    """UsageError or TypeError unless they are [T, hidden_size] of the weight's dtype and device."""
    shape = hidden_states.shape
    if hidden_states.dim() != 2 or shape[1] != hidden_size:
        raise UsageError(f"Hidden states {list(shape)} were given; [tokens, {hidden_size}] is needed.")
    if hidden_states.dtype != weight.dtype:
        raise TypeError(f"Hidden states of {hidden_states.dtype} were given; the experts are {weight.dtype}.")
    if hidden_states.device != weight.device:
        raise UsageError(f"Hidden states on {hidden_states.device} were given, experts on {weight.device}.")


def check_routing(
    tokens: int, top_k_index: Tensor, top_k_weights: Tensor, device: torch.device, top_k: int | None = None
) -> None:
    """UsageError or TypeError unless ids and weights are [tokens, top_k], integers and floating point, on ``device``.

    top_k: None where any number will do.
    """
    needed = (tokens, top_k_index.shape[-1] if top_k is None and top_k_index.dim() else top_k)
    if top_k_index.shape != needed or top_k_weights.shape != needed:
        raise UsageError(
            f"Expert ids {list(top_k_index.shape)} and weights {list(top_k_weights.shape)} were given; "
            f"both must be [{tokens}, {'top_k' if top_k is None else top_k}]."
        )
    if top_k_index.is_floating_point() or not top_k_weights.is_floating_point():
        raise TypeError(
            f"Expert ids of {top_k_index.dtype} and weights of {top_k_weights.dtype} were given; ids must be "
            "integers and weights floating point."
        )
    for name, tensor in (("Expert ids", top_k_index), ("Weights", top_k_weights)):
        if tensor.device != device:
            raise UsageError(f"{name} on {tensor.device} were given, experts on {device}.")


def check_ids(top_k_index: Tensor, num_experts: int) -> None:
    """UsageError if an id on the CPU is out of range; on a GPU that would wait for the device."""
    if top_k_index.is_cuda:
        return
    ids = top_k_index.long()
    if not bool(((ids >= -1) & (ids < num_experts)).all()):
        raise UsageError(
            f"Expert ids from {int(ids.min())} to {int(ids.max())} were given; they must be from 0 to "
            f"{num_experts - 1}, or -1 for not routed."
        )


def to_global_ids(top_k_index: Tensor, num_experts: int) -> Tensor:
    """Expert ids as int32; UsageError for those out of range on CPU, on a GPU the kernels find them."""
    check_ids(top_k_index, num_experts)
    if top_k_index.dtype == torch.int32:
        return top_k_index
    limits = torch.iinfo(torch.int32)  # beyond them an id out of range would wrap around to a valid one
    return top_k_index.clamp(limits.min, limits.max).to(torch.int32)


def check_tokens(tokens: int, max_tokens: int) -> None:
    if tokens > max_tokens:
        raise UsageError(f"{tokens} tokens were given; max_tokens is {max_tokens}, raise it or split.")


def check_not_capturing(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("setup() was called inside CUDA-graph capture; call it before.")
