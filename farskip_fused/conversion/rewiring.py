"""Between stock and FarSkip connectivity, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import nn

from farskip_fused.connectivity import Connectivity, parse_layers
from farskip_fused.conversion.layers import FarSkipLayer, unwire, wire
from farskip_fused.conversion.llama4 import Llama4Experts, choose_kernels
from farskip_fused.conversion.models import (
    FarSkipConfig,
    FarSkipModel,
    checked_model,
    decoder_of,
    register,
    replace_config,
)
from farskip_fused.conversion.verification import SelfCheck, verified
from farskip_fused.errors import UsageError
from farskip_fused.record import to_record

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model, connectivity: str | Connectivity = "farskip", layers: str | int | Iterable[int] = "all"
) -> Model:
    """Gives layers of a transformers model another connectivity, in place, and returns the model.

    model: a causal language model of transformers, or a model that reads images or sounds too, of which the text part
        is converted. Its decoder layers must be stock pre-norm layers, some of them with experts.
    connectivity: a ``Connectivity`` or its name: farskip, attention_only, moe_only, standard.
    layers: ``"all"``, ``"last:75%"``, ``"first:4"``, ``"4:20"`` or indices; all other layers get standard connectivity.

    Parameters keep their names, order, shapes and values. A converted model may be converted again, at any time: only
    the last call counts. With standard connectivity the model is bit-equal to the stock one, which is checked on one
    MoE layer and one dense one; but for Llama-4 on a GPU, whose experts run on the kernels from now on, instead of all
    of them on all tokens: ``model.set_experts_implementation("eager")`` goes back.
    Raises UsageError for a model that is built otherwise, an unknown connectivity and wrong layers, with the model
    unchanged; TypeError if ``model`` is not a transformers model.
    """
    checked = checked_model(model)
    decoder = decoder_of(checked)
    chosen = Connectivity.named(connectivity)
    converted = parse_layers(layers, len(decoder.layers))
    record = to_record(chosen, converted)
    anatomies = verified(decoder)
    if isinstance(checked, FarSkipModel):
        wire(decoder, anatomies, chosen, converted, checked.config)
        checked.config.farskip = record
        return model
    check = SelfCheck(decoder.layers, anatomies)
    register(checked.config.model_type)
    replace_config(checked, FarSkipConfig.of(type(checked.config)), farskip=record)
    checked.__class__ = FarSkipModel.of(type(checked))
    wire(decoder, anatomies, Connectivity.standard(), converted, checked.config)
    if not check.passes():
        revert(checked)
        raise UsageError(
            f"With standard connectivity, the layers of {type(checked).__name__} would compute something else than"
            " stock; this version of transformers, or a change to the model, is not supported."
        )
    wire(decoder, anatomies, chosen, converted, checked.config)
    choose_kernels(checked)
    return model


def revert(model: Model) -> Model:
    """Makes a converted model the stock model again, classes and configuration, in place; a stock model stays as it is.

    Raises UsageError if the model or a layer was given a further class after ``convert``, for example by FSDP.
    """
    checked = checked_model(model)
    if not isinstance(checked, FarSkipModel):
        return model
    if "stock_class" not in vars(type(checked)):
        raise UsageError(f"The model has class {type(checked).__name__}, put on it after convert; revert before that.")
    decoder = decoder_of(checked)
    if any(layer.anatomy.block and layer.anatomy.block.scales_inputs for layer in decoder.layers):
        if any(not isinstance(block.get_submodule("experts"), Llama4Experts) for _, block in moe_blocks(model)):
            raise UsageError("The experts were replaced after convert, and the stock block cannot call them.")
        checked.config._experts_implementation = "eager"
    unwire(decoder)
    replace_config(checked, cast(Any, type(checked.config)).stock_class, farskip=None)
    checked.__class__ = type(checked).stock_class
    return model


def connectivity_of(model: nn.Module) -> list[Connectivity]:
    """What each decoder layer runs now; standard in all layers of a stock model. Wrapped models are looked into."""
    layers = _farskip_layers(model)
    if layers:
        return [layer.connectivity for layer in layers]
    return [Connectivity.standard()] * len(decoder_of(checked_model(model)).layers)


ADDITIONS = ("stock", "routed_last")


def set_additions(model: Model, order: str) -> Model:
    """Chooses in which order a converted model's layers add up the full stream, in place; returns the model.

    order: "stock", ``(full + attention) + (routed + shared)``, as stock models and AMD's Instella-MoE file do;
        "routed_last", ``((full + attention) + shared) + routed``, as code that overlaps may, since it has the first sum
        already. They differ by rounding, and checkpoints do not say which.
    Raises UsageError for another order.
    """
    if order not in ADDITIONS:
        raise UsageError(f"Unknown order of additions {order!r}; use one of {', '.join(ADDITIONS)}.")
    for layer in _farskip_layers(model):
        layer._routed_last = order == "routed_last"
    return model


@contextmanager
def as_teacher(model: Model) -> Iterator[Model]:
    """Within it every layer runs standard connectivity, bit-equal to the stock model; restored on exit.

    Wrapped models are looked into. With activation checkpointing, a backward pass that recomputes a layer must run on
    the same side of the ``with`` as its forward pass. What ``save_pretrained`` writes does not change.
    """
    layers = _farskip_layers(model)
    if not layers:
        raise UsageError(f"The {type(model).__name__} has no FarSkip layers; convert the model first.")
    before = [layer.connectivity for layer in layers]
    try:
        for layer in layers:
            layer._connectivity = Connectivity.standard()
        yield model
    finally:
        for layer, connectivity in zip(layers, before, strict=True):
            layer._connectivity = connectivity


def moe_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of every MoE block of a supported model, stock or converted, in the order of the layers.

    Each has a router and ``experts``, as transformers builds them with ``experts.gate_up_proj`` [E, 2I, H] and
    ``experts.down_proj`` [E, H, I]; Llama-4's are [E, H, 2I] and [E, I, H].
    """
    checked = checked_model(model)
    found = [part for layer in decoder_of(checked).layers for part in layer.children() if hasattr(part, "experts")]
    names = {id(module): name for name, module in checked.named_modules()}
    return [(names[id(block)], block) for block in found]


def experts_are_transposed(model: nn.Module) -> bool:
    """Whether the family keeps its experts as [E, in, out] instead of [E, out, in]; of a converted model."""
    return any(layer.anatomy.block and layer.anatomy.block.scales_inputs for layer in _farskip_layers(model))


def _farskip_layers(model: nn.Module) -> list[FarSkipLayer]:
    return [module for module in model.modules() if isinstance(module, FarSkipLayer)]
