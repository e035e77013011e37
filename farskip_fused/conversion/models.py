"""Converted models and configurations as classes of transformers, and their registration with its Auto classes.

A converted model has its own ``model_type``, ``farskip_<type>``. Without this package its checkpoints do not load at
all, instead of loading as the stock model, which would run and be wrong.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from farskip_fused.conversion.families import CLASS_PREFIX, FAMILIES, Family, family_of
from farskip_fused.conversion.layers import wire
from farskip_fused.conversion.record import from_record
from farskip_fused.conversion.rewired import Rewired
from farskip_fused.conversion.verification import verify_layers
from farskip_fused.errors import UsageError


class FarSkipConfig(Rewired):
    """The behaviour of a converted model's configuration: the stock one's, with an entry ``farskip``."""

    @classmethod
    def _attributes(cls, stock: type) -> dict[str, Any]:
        family = family_of(stock.model_type)  # type: ignore[attr-defined]
        # Not of transformers' module: older releases do not register a configuration of their own a second time.
        return {"__name__": CLASS_PREFIX + stock.__name__, "__module__": __name__, "model_type": family.farskip_type}


class FarSkipModel(Rewired):
    """The behaviour of a converted model: it is built with the connectivity of its configuration."""

    @classmethod
    def _attributes(cls, stock: type) -> dict[str, Any]:
        config_class = FarSkipConfig.of(stock.config_class)  # type: ignore[attr-defined]
        attributes = {"__name__": CLASS_PREFIX + stock.__name__, "config_class": config_class}
        if family_of(stock.config_class.model_type).scales_inputs:  # type: ignore[attr-defined]
            # Converting gives Llama-4's experts a choice that transformers does not find in its source.
            attributes["_can_set_experts_implementation_cached_value"] = True
        return attributes

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        layers = decoder_layers(cast(PreTrainedModel, self))
        connectivity, converted = from_record(getattr(config, "farskip", None), len(layers))
        family = family_of(config.model_type)
        verify_layers(layers, family)
        wire(layers, family, connectivity, converted, config)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        if requested_experts is None and family_of(cast(Any, self).config.model_type).scales_inputs:
            requested_experts = "eager"  # transformers' default is not one for the modules inside Llama-4
        return super().get_correct_experts_implementation(requested_experts)  # type: ignore[misc]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a supported model, stock or converted."""
    return cast(Any, getattr(model, "language_model", model)).model.layers


def stock_classes(family: Family) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]] | None:
    """Configuration and model class of the family; None if the installed transformers does not have it.

    The class is the family's ``...ForCausalLM``, or its ``...ForConditionalGeneration`` if it reads images.
    """
    if family.model_type not in transformers.CONFIG_MAPPING:
        return None
    config_class = transformers.CONFIG_MAPPING[family.model_type]
    mapping: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if family.reads_images:
        mapping = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return config_class, cast(type[PreTrainedModel], mapping[config_class])


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


def register() -> None:
    """Makes transformers' Auto classes know the converted types; may be called again."""
    for family in FAMILIES.values():
        stock = stock_classes(family)
        if stock is None:
            continue
        config_class, model_class = FarSkipConfig.of(stock[0]), FarSkipModel.of(stock[1])
        AutoConfig.register(family.farskip_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        if family.reads_images:
            AutoModelForImageTextToText.register(config_class, model_class, exist_ok=True)
        # Without it the experts' weights, one tensor an expert in a checkpoint, would not be found and stay random.
        mapping = get_checkpoint_conversion_mapping(family.model_type)
        if mapping is not None:
            register_checkpoint_conversion_mapping(family.farskip_type, mapping, overwrite=True)


def checked_model(model: Any) -> tuple[PreTrainedModel, Family]:
    """``model`` and its family; TypeError if it is no transformers model, UsageError if it is not a supported one."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"A {type(model).__module__}.{type(model).__name__} was given; give the transformers model itself,"
            " before it is wrapped."
        )
    family = family_of(model.config.model_type)
    stock = stock_classes(family)
    if stock is None or not isinstance(model, stock[1]):
        wanted = stock[1].__name__ if stock else f"a {family.model_type} of a newer transformers"
        kind = "model that also reads images" if family.reads_images else "causal language model"
        raise UsageError(f"A {type(model).__name__} was given; only the {kind}, {wanted}, is supported.")
    return model, family
