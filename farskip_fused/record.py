"""What a converted checkpoint's config.json says: the names of its types, and which connectivity runs in which layers.

Free of torch and transformers: conversion writes it, the serving engines' adapters read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from farskip_fused.connectivity import Connectivity, parse_layers
from farskip_fused.errors import UsageError

TYPE_PREFIX = "farskip_"
CLASS_PREFIX = "FarSkip"
VERSION = 1


def stock_type(model_type: str) -> str:
    """The ``model_type`` of the stock model, from that of a stock or converted one."""
    return str(model_type).removeprefix(TYPE_PREFIX)


def to_record(connectivity: Connectivity, layers: Sequence[int]) -> dict[str, Any]:
    """What ``convert`` was told, for config.json. Layers in a row are written as ``"4:20"``, others as a list."""
    first, end = layers[0], layers[-1] + 1
    contiguous = list(layers) == list(range(first, end))
    return {
        "version": VERSION,
        "connectivity": connectivity.to_dict(),
        "layers": f"{first}:{end}" if contiguous else list(layers),
    }


def from_record(record: Any, num_layers: int) -> tuple[Connectivity, list[int]]:
    """The connectivity and the layers of a record; UsageError for anything that ``to_record`` does not write."""
    if not isinstance(record, dict) or not {"version", "connectivity", "layers"} <= record.keys():
        raise UsageError(
            f'The "farskip" entry of the configuration must have version, connectivity and layers, but is {record!r}.'
        )
    if record["version"] != VERSION:
        raise UsageError(
            f'The "farskip" entry of the configuration has version {record["version"]!r}, this package reads {VERSION};'
            " install the farskip-fused that wrote it."
        )
    written = record["connectivity"]
    if not isinstance(written, dict) or written.keys() != Connectivity.standard().to_dict().keys():
        raise UsageError(f'The "farskip" entry of the configuration has an unknown connectivity {written!r}.')
    return Connectivity(**written), parse_layers(record["layers"], num_layers)
