"""Dynamic subclasses of transformers' own classes, put on objects by ``__class__`` assignment, or registered."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, cast

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping


class Rewired:
    """Base of a rewired class: ``SomeBase.of(Stock)`` is the subclass of ``Stock`` with the behaviour of ``SomeBase``.

    The subclass keeps the module of the stock class: from it transformers derives whether a model is its own, and with
    that which weight conversions, attention and experts implementations it may use.
    """

    rewired_by: ClassVar[type[Rewired]]
    stock_class: ClassVar[type]

    @classmethod
    def of(cls, stock: type) -> type:
        """The subclass of ``stock``, the same object at every call."""
        return _subclass(cast(Any, cls), stock)

    @classmethod
    def _attributes(cls, stock: type) -> dict[str, Any]:
        """Name and further class attributes of the subclass of ``stock``."""
        return {"__name__": stock.__name__}

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if "stock_class" not in vars(type(self)):  # a subclass made by somebody else, for example by FSDP
            return reduced
        # A dynamic class has no name to import it by; the stock class has.
        return (_new, (self.rewired_by, self.stock_class), *reduced[2:])


def register_classes(model_type: str, config_class: type, model_class: type, stock_type: str) -> None:
    """Makes transformers' Auto classes know a type whose checkpoints hold what those of ``stock_type`` hold."""
    AutoConfig.register(model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    # Without it the experts' weights, one tensor an expert in a checkpoint, would not be found and stay random.
    mapping = get_checkpoint_conversion_mapping(stock_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


@functools.cache
def _subclass(base: type[Rewired], stock: type) -> type:
    attributes = base._attributes(stock)
    name = attributes.pop("__name__")
    own = {"__module__": stock.__module__, "__qualname__": name, "rewired_by": base, "stock_class": stock}
    return type(name, (base, stock), own | attributes)


def _new(base: type[Rewired], stock: type) -> Any:
    rewired: Any = base.of(stock)
    return rewired.__new__(rewired)
