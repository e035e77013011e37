"""A frozen model whose matrices are 8-bit integers with one scale a row: half the memory of bfloat16."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

LARGEST = 127
# Names of routers, or of what holds them: few weights, and a rounding there sends tokens to other experts.
KEPT = {"gate", "router"}


class Int8Rows(nn.Module):
    """A parametrization: the weight is put together from integers and scales whenever it is read."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, rows: Tensor, scales: Tensor) -> Tensor:
        return rows.to(self.dtype) * scales

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Integers of the weight's shape, and scales [..., 1] in its dtype."""
        scales = weight.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / LARGEST
        return (weight / scales).round().to(torch.int8), scales


def quantize(model: nn.Module) -> nn.Module:
    """A frozen copy of the model with the matrices and experts of its layers in 8 bits.

    Embeddings, head, routers and norms stay as they are. Only one weight at a time is copied in full.
    """
    from farskip_fused.conversion import decoder_layers

    places = [
        (name, key)
        for name, module in model.named_modules()
        if any(module is part for layer in decoder_layers(model) for part in layer.modules())
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and KEPT.isdisjoint(name.split("."))
    ]
    # Until they are quantised these are the model's own, so that no copy of all of them is ever there.
    borrowed = [model.get_submodule(name).get_parameter(key) for name, key in places]
    copied = copy.deepcopy(model, {id(parameter): parameter for parameter in borrowed})
    for (name, key), parameter in zip(places, borrowed, strict=True):
        module = copied.get_submodule(name)
        setattr(module, key, nn.Parameter(parameter.detach(), requires_grad=False))
        parametrize.register_parametrization(module, key, Int8Rows(parameter.dtype))
    return copied.requires_grad_(False)
