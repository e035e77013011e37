"""Converted models and configurations as classes of transformers, and their registration with its Auto classes.

A converted model has its own ``model_type``, ``farskip_<type>``. Without this package its checkpoints do not load at
all, instead of loading as the stock model, which would run and be wrong.
"""

from __future__ import annotations

import copy
import sys
from typing import Any, cast

import transformers
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from farskip_fused.conversion import llama4
from farskip_fused.conversion.families import FAMILIES
from farskip_fused.conversion.instella import register_instella
from farskip_fused.conversion.layers import wire
from farskip_fused.conversion.rewired import Rewired, register_classes
from farskip_fused.conversion.verification import verified
from farskip_fused.errors import UsageError
from farskip_fused.record import CLASS_PREFIX, TYPE_PREFIX, from_record, stock_type


class FarSkipConfig(Rewired):
    """The behaviour of a converted model's configuration: the stock one's, with an entry ``farskip``."""

    @classmethod
    def _attributes(cls, stock: type) -> dict[str, Any]:
        farskip_type = TYPE_PREFIX + stock.model_type  # type: ignore[attr-defined]
        # Not of transformers' module: older releases do not register a configuration of their own a second time.
        return {"__name__": CLASS_PREFIX + stock.__name__, "__module__": __name__, "model_type": farskip_type}


class FarSkipModel(Rewired):
    """The behaviour of a converted model: it is built with the connectivity of its configuration."""

    supports_pp_plan = False
    _default_experts: str | None = None

    @classmethod
    def _attributes(cls, stock: type) -> dict[str, Any]:
        config_class = FarSkipConfig.of(stock.config_class)  # type: ignore[attr-defined]
        attributes = {"__name__": CLASS_PREFIX + stock.__name__, "config_class": config_class}
        if hasattr(sys.modules[stock.__module__], llama4.STOCK_CLASS):
            # Converting gives Llama-4's experts a choice that transformers does not find in its source; its default is
            # not one for the modules inside.
            attributes |= {"_can_set_experts_implementation_cached_value": True, "_default_experts": "eager"}
        return attributes

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        decoder = decoder_of(cast(PreTrainedModel, self))
        connectivity, converted = from_record(getattr(config, "farskip", None), len(decoder.layers))
        wire(decoder, verified(decoder), connectivity, converted, config)

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        given = distributed_config if isinstance(distributed_config, dict) else vars(distributed_config or object)
        if (given.get("pp_size") or 1) > 1:
            raise UsageError(
                f"pp_size is {given['pp_size']}, but pipeline stages pass on one tensor and FarSkip's layers two; use"
                " tensor, expert or data parallelism."
            )
        return super().prepare_distribute_model(distributed_config, *args, **kwargs)  # type: ignore[misc]

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        wanted = requested_experts or self._default_experts
        return cast(str, super().get_correct_experts_implementation(wanted))  # type: ignore[misc]


def decoder_of(model: PreTrainedModel) -> Any:
    """The module that runs the decoder layers, as its ``layers``, of a model, stock or converted.

    It is found by what it is: the one module with a list of ``layers`` of which some have experts. UsageError if there
    is none or several.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(layers := getattr(module, "layers", None), nn.ModuleList)
        and any(hasattr(part, "experts") for layer in layers for part in layer.children())
    ]
    if len(found) != 1:
        what = "no MoE layer" if not found else "several stacks of MoE layers"
        raise UsageError(f"The {type(model).__name__} has {what}; only models with one such stack can be converted.")
    return found[0]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a model, stock, converted or wrapped."""
    return cast(nn.ModuleList, decoder_of(cast(PreTrainedModel, model)).layers)


def stock_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]] | None:
    """Configuration and model class of a stock type; None if the installed transformers has none that writes text.

    The class that reads images or sounds too, if there is one; otherwise the causal language model.
    """
    if model_type not in transformers.CONFIG_MAPPING:
        return None
    config_class = transformers.CONFIG_MAPPING[model_type]
    mappings: Any = (transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
    found = next((mapping[config_class] for mapping in mappings if config_class in mapping), None)
    return None if found is None else (config_class, cast(type[PreTrainedModel], found))


def checked_stock_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Those of ``stock_classes``; UsageError if there are none."""
    found = stock_classes(model_type)
    if found is None:
        raise UsageError(
            f"The installed transformers has no language model of type {model_type!r}; install a newer one."
        )
    return found


def replace_config(model: PreTrainedModel, config_class: type, **entries: Any) -> None:
    """Gives the model its own copy of its configuration, of another class and with further entries (None deletes one).

    A copy, because other models may have been built from the same object; in every module, because transformers
    changes a configuration, or those inside it, in place and expects all modules to see it.
    """
    old = model.config
    new = copy.deepcopy(old)
    replaced = {id(old): new} | {id(getattr(old, name)): getattr(new, name) for name in old.sub_configs}
    new.__class__ = config_class
    for name, value in entries.items():
        if value is None:
            delattr(new, name)
        else:
            setattr(new, name, value)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)])


def register(model_type: str) -> None:
    """Makes transformers' Auto classes know the converted form of a stock type; may be called again."""
    stock = stock_classes(model_type)
    if stock is None:
        return
    config_class, model_class = FarSkipConfig.of(stock[0]), FarSkipModel.of(stock[1])
    register_classes(TYPE_PREFIX + model_type, config_class, model_class, model_type)
    if stock[0] in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        AutoModelForImageTextToText.register(config_class, model_class, exist_ok=True)


def register_all() -> None:
    register_instella()
    for model_type in FAMILIES:
        register(model_type)


def checked_model(model: Any) -> PreTrainedModel:
    """``model``; TypeError if it is no transformers model, UsageError if it is not one that writes text."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"A {type(model).__module__}.{type(model).__name__} was given; give the transformers model itself,"
            " before it is wrapped."
        )
    if hasattr(model, "_pp_stage"):
        raise UsageError("The model is one stage of a pipeline, whose stages pass on one tensor; FarSkip needs two.")
    stock = checked_stock_classes(stock_type(model.config.model_type))
    if not isinstance(model, stock[1]):
        raise UsageError(
            f"A {type(model).__name__} was given; only the whole model, {stock[1].__name__}, is converted."
        )
    return model
