"""Configurations of converted checkpoints as vLLM sees them.

A converted checkpoint has a type of its own, ``farskip_<type>``, by which it is found. vLLM keys other choices on the
type, latent attention among them, so an instance presents the stock one; its class, which names what is written, does
not.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from farskip_fused.record import TYPE_PREFIX

STOCK_TYPES = ("deepseek_v2", "deepseek_v3", "llama4_text", "qwen3_moe")


class _Served:
    """The behaviour of such a configuration, mixed into the stock class."""

    stock_class: type[PreTrainedConfig]

    def __post_init__(self, **entries: Any) -> None:
        # Not in __init__: transformers makes every configuration a dataclass, which has one of its own.
        super().__post_init__(**entries)  # type: ignore[misc]
        self.model_type = self.stock_class.model_type

    def __reduce__(self) -> Any:
        # The class is made at run time and has no name to import it by; the processes of vLLM exchange instances.
        return _restored, (self.stock_class.model_type, vars(self))


def served(stock_type: str) -> type[PreTrainedConfig]:
    """The class for converted checkpoints of a stock type, the same object at every call."""
    if stock_type not in _CLASSES:
        stock = CONFIG_MAPPING[stock_type]
        body = {"model_type": TYPE_PREFIX + stock_type, "stock_class": stock, "__module__": __name__}
        _CLASSES[stock_type] = type(f"FarSkip{stock.__name__}", (_Served, stock), body)
    return _CLASSES[stock_type]


_CLASSES: dict[str, type[PreTrainedConfig]] = {}


def _restored(stock_type: str, entries: dict[str, Any]) -> PreTrainedConfig:
    config = served(stock_type).__new__(served(stock_type))
    vars(config).update(entries)
    return config


def register() -> None:
    """Makes vLLM read converted checkpoints; may be called again."""
    from vllm.transformers_utils import config as vllm_config

    for stock_type in STOCK_TYPES:
        # vLLM gives a class from this table to transformers just before it reads a checkpoint. Registered there once,
        # it could be gone by then: farskip_fused.conversion registers its own classes for these types.
        vllm_config._CONFIG_REGISTRY[TYPE_PREFIX + stock_type] = served(stock_type)
