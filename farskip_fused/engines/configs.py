"""Configurations of converted checkpoints as an engine sees them.

A converted checkpoint has a type of its own, ``farskip_<type>``, by which it is found. Engines key other choices on the
type, latent attention among them, so an instance presents the stock one; its class, which names what is written, does
not.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from farskip_fused.record import TYPE_PREFIX


class _Served:
    """The behaviour of such a configuration, mixed into the stock class."""

    stock_class: type[PreTrainedConfig]

    def __post_init__(self, **entries: Any) -> None:
        # Not in __init__: transformers makes every configuration a dataclass, which has one of its own.
        super().__post_init__(**entries)  # type: ignore[misc]
        self.model_type = self.stock_class.model_type

    def __reduce__(self) -> Any:
        # The class is made at run time and has no name to import it by; the processes of an engine exchange instances.
        return _restored, (self.stock_class.model_type, vars(self))


@functools.cache
def served(stock_type: str) -> type[PreTrainedConfig]:
    """The class for converted checkpoints of a stock type, the same object at every call."""
    stock = CONFIG_MAPPING[stock_type]
    body = {"model_type": TYPE_PREFIX + stock_type, "stock_class": stock, "__module__": __name__}
    return type(f"FarSkip{stock.__name__}", (_Served, stock), body)


def _restored(stock_type: str, entries: dict[str, Any]) -> PreTrainedConfig:
    config = served(stock_type).__new__(served(stock_type))
    vars(config).update(entries)
    return config
