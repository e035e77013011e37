"""A decoder layer of transformers with FarSkip connectivity.

One class serves all families: a dynamic subclass of the stock layer class with its own ``forward``. Parameters, their
names, hooks and parallel plans stay as they are. Between the layers travel ``Streams`` instead of a tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig

from farskip_fused.connectivity import Connectivity, Streams, advance
from farskip_fused.conversion import llama4
from farskip_fused.conversion.anatomy import Anatomy
from farskip_fused.conversion.rewired import Rewired
from farskip_fused.errors import UsageError


class FarSkipLayer(Rewired):
    """The behaviour of a converted decoder layer. Its class keeps the stock name, by which FSDP and accelerate wrap.

    The first layer receives a tensor, which is every stream; the last one returns a tensor, the full stream.
    """

    _connectivity: Connectivity
    _anatomy: Anatomy
    _depth: int
    _is_first: bool
    _is_last: bool
    _routed_last = False

    @property
    def connectivity(self) -> Connectivity:
        """What the layer runs now; ``convert`` and ``as_teacher`` switch it."""
        return self._connectivity

    @property
    def anatomy(self) -> Anatomy:
        return self._anatomy

    def forward(self, hidden_states: Tensor | Streams, **kwargs: Any) -> Tensor | Streams:
        """hidden_states: [batch, sequence, hidden], or ``Streams`` of them; kwargs: those of the stock layer."""
        layer, anatomy = cast(Any, self), self._anatomy
        if layer.gradient_checkpointing and layer.training:
            _refuse_reentrant(layer._gradient_checkpointing_func)
        if isinstance(hidden_states, tuple):
            streams = Streams(*hidden_states)
        elif self._is_first:
            streams = Streams.before_layers(hidden_states, self._depth)
        else:
            raise UsageError(
                "A layer inside a FarSkip model was given one tensor instead of streams; pipeline stages, which"
                " pass on one tensor, cannot be used with it."
            )
        streams = advance(
            streams,
            self._connectivity,
            attention=lambda x: anatomy.attend(layer, x, kwargs),
            mlp=lambda x: anatomy.split_mlp(layer, x),
            multiplier=anatomy.multiplier(layer),
            routed_last=self._routed_last,
        )
        return streams.full if self._is_last else streams


class FarSkipDecoder(Rewired):
    """The behaviour of a decoder that adds what is seen in images to what its first layers return: to all streams."""

    def _deepstack_process(self, hidden_states: Tensor | Streams, *args: Any) -> Tensor | Streams:
        add = super()._deepstack_process  # type: ignore[misc]
        if isinstance(hidden_states, tuple):
            return Streams.of(add(stream, *args) for stream in Streams(*hidden_states).sums)
        return cast(Tensor, add(hidden_states, *args))


def wire(
    decoder: nn.Module,
    anatomies: Iterable[Anatomy],
    connectivity: Connectivity,
    converted: Collection[int],
    config: PreTrainedConfig,
) -> None:
    """Puts the FarSkip class on all layers: ``connectivity`` in those converted, standard connectivity in the others.

    decoder: the module that holds them as ``layers``. anatomies: of the layers, one each. config: the model's.
    """
    layers = list(cast(nn.ModuleList, decoder.layers))
    if hasattr(decoder, "_deepstack_process") and not isinstance(decoder, FarSkipDecoder):
        decoder.__class__ = FarSkipDecoder.of(type(decoder))
    for index, (module, anatomy) in enumerate(zip(layers, anatomies, strict=True)):
        if not isinstance(module, FarSkipLayer):
            module.__class__ = FarSkipLayer.of(type(module))
        layer = cast(FarSkipLayer, module)
        layer._connectivity = connectivity if index in converted else Connectivity.standard()
        layer._anatomy, layer._depth = anatomy, connectivity.depth
        layer._is_first, layer._is_last = index == 0, index == len(layers) - 1
        if anatomy.block and anatomy.block.scales_inputs:
            llama4.enrol(module.get_submodule(f"{anatomy.mlp}.experts"), config)


def unwire(decoder: nn.Module) -> None:
    """Puts the stock class back on all layers; UsageError if somebody has put a further class on one."""
    rewired = [cast(Any, layer) for layer in cast(nn.ModuleList, decoder.layers)]
    for layer in rewired:
        if "stock_class" not in vars(type(layer)):
            raise UsageError(f"A layer has class {type(layer).__name__}, put on it after convert; revert before that.")
    for layer in rewired:
        if layer.anatomy.block and layer.anatomy.block.scales_inputs:
            llama4.dismiss(layer.get_submodule(f"{layer.anatomy.mlp}.experts"))
        layer.__class__ = type(layer).stock_class
        del layer._connectivity, layer._anatomy, layer._depth, layer._is_first, layer._is_last
        vars(layer).pop("_routed_last", None)
    if isinstance(decoder, FarSkipDecoder):
        cast(Any, decoder).__class__ = type(decoder).stock_class


def _refuse_reentrant(checkpoint: Any) -> None:
    """transformers holds the checkpointing function as a partial with the user's choice among its keywords."""
    if getattr(checkpoint, "keywords", {}).get("use_reentrant") is not False:
        raise UsageError(
            "Reentrant activation checkpointing loses the gradients of FarSkip's second stream;"
            ' enable checkpointing with {"use_reentrant": False}.'
        )
