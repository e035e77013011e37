"""What FarSkip is: which residual stream each sub-block of a layer reads.

Source: FarSkip-Collective, arXiv 2511.11505. Between two layers travel two streams, ``full`` (everything so far) and
``partial`` (everything but the routed experts of the layer before). A converted layer's attention reads ``partial``,
so it need not wait for the previous combine; its MLP reads ``full`` from before its own attention, so its dispatch
need not wait for that attention.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from farskip_fused.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Connectivity:
    """Which stream the attention and the MLP of a layer read.

    attention_reads_partial: attention skips the routed experts of the layer before.
    mlp_reads_before_attention: the MLP skips this layer's own attention.
    depth: how many combines may be in flight behind the MoE's input; 1 is the paper's.
    """

    attention_reads_partial: bool
    mlp_reads_before_attention: bool
    depth: int = 1

    def __post_init__(self) -> None:
        if self.depth != 1:
            raise UsageError(f"Connectivity depth {self.depth} was asked for; this version supports depth 1 only.")

    @classmethod
    def farskip(cls) -> Connectivity:
        return cls(attention_reads_partial=True, mlp_reads_before_attention=True)

    @classmethod
    def standard(cls) -> Connectivity:
        return cls(attention_reads_partial=False, mlp_reads_before_attention=False)

    @classmethod
    def attention_only(cls) -> Connectivity:
        return cls(attention_reads_partial=True, mlp_reads_before_attention=False)

    @classmethod
    def moe_only(cls) -> Connectivity:
        return cls(attention_reads_partial=False, mlp_reads_before_attention=True)

    @classmethod
    def named(cls, name: str | Connectivity) -> Connectivity:
        """The connectivity of that name; a ``Connectivity`` is returned as it is.

        Raises UsageError for an unknown name.
        """
        if isinstance(name, cls):
            return name
        if name not in NAMES:
            raise UsageError(f"Unknown connectivity {name!r}; use one of {', '.join(NAMES)}.")
        return getattr(cls, name)()

    @property
    def name(self) -> str:
        return next(name for name in NAMES if getattr(type(self), name)() == self)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


NAMES = ("farskip", "attention_only", "moe_only", "standard")


class Streams(NamedTuple):
    """What travels between two layers; both have the shape and dtype of the hidden states."""

    full: Tensor
    partial: Tensor


def advance(
    streams: Streams,
    connectivity: Connectivity,
    attention: Callable[[Tensor], Tensor],
    mlp: Callable[[Tensor], tuple[Tensor | None, Tensor | None]],
    multiplier: float = 1.0,
    routed_last: bool = False,
) -> Streams:
    """One layer, without overlap: the oracle of everything that overlaps.

    attention: norm and attention, from a stream to an output of the same shape.
    mlp: norm and MLP; returns ``(shared, routed)``. A dense layer returns ``(output, None)``, an MoE without shared
        experts ``(None, routed)``.
    multiplier: scales everything that is added to a stream, as in Granite.
    The order of additions, ``(full + attention) + (routed + shared)``, is that of the stock models, so that standard
    connectivity is bit-equal to them; with ``routed_last`` it is ``((full + attention) + shared) + routed``.
    """

    def scaled(output: Tensor) -> Tensor:
        return output if multiplier == 1.0 else output * multiplier

    base = streams.full + scaled(attention(streams.partial if connectivity.attention_reads_partial else streams.full))
    shared, routed = mlp(streams.full if connectivity.mlp_reads_before_attention else base)
    if routed is None:
        full = base if shared is None else base + scaled(shared)
        return Streams(full, full)
    if shared is None:
        return Streams(base + scaled(routed), base)
    partial = base + scaled(shared)
    return Streams(partial + scaled(routed) if routed_last else base + scaled(routed + shared), partial)


def parse_layers(layers: str | int | Iterable[int], num_layers: int) -> list[int]:
    """Indices of the layers that an expression selects, sorted.

    ``"all"``, ``"last:75%"``, ``"last:4"``, ``"first:4"``, ``"first:50%"``, ``"4:20"`` (end excluded) or indices.
    A percentage is rounded to the nearest number of layers, at least one.
    Raises UsageError for anything else and for indices outside the model.
    """
    if isinstance(layers, str):
        chosen: Sequence[int] = _parse_expression(layers, num_layers)
    else:
        chosen = [layers] if isinstance(layers, int) else list(layers)
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in chosen):
            raise UsageError(f"Layers {layers!r} must be an expression or integers.")
    outside = [index for index in chosen if not 0 <= index < num_layers]
    if outside or not chosen:
        what = f"layers {outside} are outside" if outside else "no layer is selected of"
        raise UsageError(f"Layers {layers!r}: {what} the model's {num_layers} layers (0 to {num_layers - 1}).")
    return sorted(set(chosen))


def _parse_expression(expression: str, num_layers: int) -> list[int]:
    if expression == "all":
        return list(range(num_layers))
    if found := re.fullmatch(r"(first|last):(\d+)(%?)", expression):
        side, number, percent = found[1], int(found[2]), found[3]
        count = max(1, round(num_layers * number / 100)) if percent else number
        if (percent and not 0 < number <= 100) or not 0 < count <= num_layers:
            raise UsageError(f"Layers {expression!r} selects more or fewer layers than the model's {num_layers}.")
        return list(range(count) if side == "first" else range(num_layers - count, num_layers))
    if found := re.fullmatch(r"(\d+):(\d+)", expression):
        return list(range(int(found[1]), int(found[2])))
    raise UsageError(
        f'Unknown layers expression {expression!r}; use "all", "last:75%", "first:4", "4:20" or a list of indices.'
    )
