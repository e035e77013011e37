"""A frozen model whose layers lie in the processor's memory and come to the device one at a time."""

from __future__ import annotations

import copy

import torch
from torch import nn


def copy_offloaded(model: nn.Module) -> nn.Module:
    """A frozen copy of the model; on the device are its embeddings, its head, and whatever layer runs.

    Uses accelerate's hooks, a layer's weights at a time.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    from farskip_fused.conversion import decoder_layers

    device = next(model.parameters()).device
    memo: dict[int, object] = {}
    for layer in decoder_layers(model):
        for parameter in layer.parameters():
            memo[id(parameter)] = nn.Parameter(_in_host_memory(parameter), requires_grad=False)
    copied = copy.deepcopy(model, memo).requires_grad_(False)
    for layer in decoder_layers(copied):
        weights = {name: parameter.data for name, parameter in layer.named_parameters()}
        hook = AlignDevicesHook(device, offload=True, weights_map=weights, place_submodules=True)
        add_hook_to_module(layer, hook)
    return copied


def _in_host_memory(parameter: nn.Parameter) -> torch.Tensor:
    """Pinned where there is a GPU to copy to."""
    host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
    return host.copy_(parameter.detach())
