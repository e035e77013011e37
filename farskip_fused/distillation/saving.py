"""A trained model to disk, also one that is split over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from farskip_fused.moe import FusedExperts

# Under transformers' names.
EXPERTS = {"w13": "gate_up_proj", "w2": "down_proj"}


def save_trained(
    model: nn.Module,
    path: Path,
    dtype: torch.dtype | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Saves a transformers model, whole, whatever ``distill`` has made of it; collective, written by rank 0.

    dtypes: of the saved tensors by name, as ``stored_dtypes`` found them before training. dtype: of floating-point
    tensors that are not among them; by default what the model has.
    """
    known = dtypes or {}
    state = _whole_state(model)
    for name, each in state.items():
        if each.is_floating_point():
            state[name] = each.to(known.get(name, dtype or each.dtype))
    if not dist.is_initialized() or dist.get_rank() == 0:
        # Of the class: an expert-parallel model's own refuses, as it knows of this rank's experts only.
        cast(Any, type(model)).save_pretrained(model, path, state_dict=state, is_main_process=True)
    if dist.is_initialized():
        dist.barrier()


def stored_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Of every tensor by name: not all are alike, a router's bias may be of 32 bits in a model of 16."""
    return {name: each.dtype for name, each in model.state_dict().items()}


def _whole_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights on the processor, by transformers' names."""
    split = {name: each for name, each in model.named_modules() if isinstance(each, FusedExperts) and not each.is_alone}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        owner, _, last = name.rpartition(".")
        if owner in split:
            name, tensor = f"{owner}.{EXPERTS[last]}", _gathered(model, tensor)
        elif isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        state[name] = tensor.detach().cpu()
    return state


def _gathered(model: nn.Module, weight: Tensor) -> Tensor:
    """The experts of all ranks [E, ...], in the layout of the model's family."""
    from farskip_fused.conversion import experts_are_transposed

    parts = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, weight.detach().contiguous())
    whole = torch.cat(parts)
    return whole.transpose(1, 2).contiguous() if experts_are_transposed(model) else whole
