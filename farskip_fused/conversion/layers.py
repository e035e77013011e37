"""A decoder layer of transformers with FarSkip connectivity.

One class serves all families: a dynamic subclass of the stock layer class with its own ``forward``. Parameters, their
names, hooks and parallel plans stay as they are. Between the layers travel ``Streams`` instead of a tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from farskip_fused.connectivity import Connectivity, Streams, advance
from farskip_fused.conversion import llama4
from farskip_fused.conversion.families import Family
from farskip_fused.conversion.rewired import Rewired
from farskip_fused.errors import UsageError


class FarSkipLayer(Rewired):
    """The behaviour of a converted decoder layer. Its class keeps the stock name, by which FSDP and accelerate wrap.

    The first layer receives a tensor, which is both streams; the last one returns a tensor, the full stream.
    """

    _connectivity: Connectivity
    _family: Family
    _is_last: bool

    @property
    def connectivity(self) -> Connectivity:
        """What the layer runs now; ``convert`` and ``as_teacher`` switch it."""
        return self._connectivity

    def forward(self, hidden_states: Tensor | Streams, **kwargs: Any) -> Tensor | Streams:
        """hidden_states: [batch, sequence, hidden], or two of them; kwargs: those of the stock layer."""
        layer = cast(Any, self)
        if layer.gradient_checkpointing and layer.training:
            _refuse_reentrant(layer._gradient_checkpointing_func)
        if self._family.scales_inputs:
            kwargs.pop("position_ids", None)  # which Llama-4's layers keep from their attention
        streams = Streams(*hidden_states) if isinstance(hidden_states, tuple) else Streams(hidden_states, hidden_states)
        streams = advance(
            streams,
            self._connectivity,
            attention=lambda x: layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)[0],
            mlp=lambda x: split_mlp(mlp_of(layer, self._family), self._family, layer.post_attention_layernorm(x)),
        )
        return streams.full if self._is_last else streams


def mlp_of(layer: nn.Module, family: Family) -> nn.Module:
    """The MLP or MoE block of a decoder layer."""
    return layer.get_submodule(family.mlp)


def split_mlp(mlp: nn.Module, family: Family, hidden_states: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Shared and routed output of an MoE block; ``(output, None)`` of a dense MLP.

    hidden_states: [batch, sequence, hidden]; both outputs have its shape. Whatever module sits at ``mlp.experts`` is
    called as ``experts(hidden [N, H], indices [N, K], weights [N, K]) -> [N, H]``, for Llama-4 with scaled hidden
    states, a row for each expert of a token, and weights of one.
    """
    block = cast(Any, mlp)
    if not hasattr(block, "experts"):
        return block(hidden_states), None
    if block.training and getattr(block, "jitter_noise", 0) > 0:  # Mixtral
        noise = torch.empty_like(hidden_states).uniform_(1.0 - block.jitter_noise, 1.0 + block.jitter_noise)
        hidden_states = hidden_states * noise
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    if family.scales_inputs:
        routed = llama4.split_block(block, flat).view(hidden_states.shape)
    else:
        _, weights, indices = getattr(block, family.router)(flat)
        routed = block.experts(flat, indices, weights).view(hidden_states.shape)
    shared_experts = getattr(block, family.shared) if family.shared else None
    if shared_experts is None:
        return None, routed
    shared = shared_experts(hidden_states)
    if family.shared_gate:
        shared = torch.sigmoid(getattr(block, family.shared_gate)(hidden_states)) * shared
    return shared, routed


def wire(
    layers: Iterable[nn.Module],
    family: Family,
    connectivity: Connectivity,
    converted: Collection[int],
    config: PreTrainedConfig,
) -> None:
    """Puts the FarSkip class on all layers: ``connectivity`` in those converted, standard connectivity in the others.

    config: the model's. The layers must have been verified, or be converted already.
    """
    layers = list(layers)
    for index, module in enumerate(layers):
        if not isinstance(module, FarSkipLayer):
            module.__class__ = FarSkipLayer.of(type(module))
        layer = cast(FarSkipLayer, module)
        layer._connectivity = connectivity if index in converted else Connectivity.standard()
        layer._family = family
        layer._is_last = index == len(layers) - 1
        if family.scales_inputs and hasattr(block := mlp_of(module, family), "experts"):
            llama4.enrol(block.get_submodule("experts"), config)


def unwire(layers: Iterable[nn.Module]) -> None:
    """Puts the stock class back on all layers; UsageError if somebody has put a further class on one."""
    rewired = [cast(Any, layer) for layer in layers]
    for layer in rewired:
        if "stock_class" not in vars(type(layer)):
            raise UsageError(f"A layer has class {type(layer).__name__}, put on it after convert; revert before that.")
    for layer in rewired:
        if layer._family.scales_inputs and hasattr(block := mlp_of(layer, layer._family), "experts"):
            llama4.dismiss(block.get_submodule("experts"))
        layer.__class__ = type(layer).stock_class
        del layer._connectivity, layer._family, layer._is_last


def _refuse_reentrant(checkpoint: Any) -> None:
    """transformers holds the checkpointing function as a partial with the user's choice among its keywords."""
    if getattr(checkpoint, "keywords", {}).get("use_reentrant") is not False:
        raise UsageError(
            "Reentrant activation checkpointing loses the gradients of FarSkip's second stream;"
            ' enable checkpointing with {"use_reentrant": False}.'
        )
