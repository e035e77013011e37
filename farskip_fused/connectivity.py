"""What FarSkip is: which residual stream each sub-block of a layer reads.

Source: FarSkip-Collective, arXiv 2511.11505. Between two layers travel two streams, ``full`` (everything so far) and
``partial`` (everything but the routed experts of the layer before). A converted layer's attention reads ``partial``,
so it need not wait for the previous combine; its MLP reads ``full`` from before its own attention, so its dispatch
need not wait for that attention. At depth d both lack the routed experts of d - 1 more layers, and d + 1 sums travel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from farskip_fused.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


MOST_DEPTH = 3


@dataclass(frozen=True)
class Connectivity:
    """Which stream the attention and the MLP of a layer read.

    attention_reads_partial: attention skips the routed experts of the layer before.
    mlp_reads_before_attention: the MLP skips this layer's own attention.
    depth: how many layers back the newest routed experts lie that the MLP reads, 1 to 3; the attention's lie one more.
        1 is the paper's; more is for farskip alone.
    """

    attention_reads_partial: bool
    mlp_reads_before_attention: bool
    depth: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.depth, int) or not 1 <= self.depth <= MOST_DEPTH:
            raise UsageError(f"Connectivity depth {self.depth!r} was asked for; use 1 to {MOST_DEPTH}.")
        if self.depth > 1 and not (self.attention_reads_partial and self.mlp_reads_before_attention):
            raise UsageError(f"Connectivity depth {self.depth} is for farskip, where both parts skip; use depth 1.")

    @classmethod
    def farskip(cls, depth: int = 1) -> Connectivity:
        """Both parts skip: attention the routed experts of the layer before, the MLP its own layer's attention."""
        return cls(attention_reads_partial=True, mlp_reads_before_attention=True, depth=depth)

    @classmethod
    def standard(cls) -> Connectivity:
        """That of stock models: neither part skips anything."""
        return cls(attention_reads_partial=False, mlp_reads_before_attention=False)

    @classmethod
    def attention_only(cls) -> Connectivity:
        """Attention skips, the MLP does not."""
        return cls(attention_reads_partial=True, mlp_reads_before_attention=False)

    @classmethod
    def moe_only(cls) -> Connectivity:
        """The MLP skips, attention does not."""
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
        chosen: Connectivity = getattr(cls, name)()
        return chosen

    @property
    def name(self) -> str:
        """One of ``NAMES``; the depth is not part of it."""
        return next(name for name in NAMES if getattr(type(self), name)() == replace(self, depth=1))

    @property
    def attention_lacks(self) -> int:
        """Of how many layers before, the newest ones, the attention does not read the routed experts."""
        return self.depth if self.attention_reads_partial else 0

    @property
    def mlp_lacks(self) -> int:
        """The same of the MLP."""
        return self.depth - 1

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


NAMES = ("farskip", "attention_only", "moe_only", "standard")


class Streams(NamedTuple):
    """What travels between two layers: sums of the hidden states' shape and dtype.

    full: of everything so far. partial: of everything but the routed experts of the layer before. deeper: of everything
    but those of the two layers before, of the three, and so on.
    """

    full: Tensor
    partial: Tensor
    deeper: tuple[Tensor, ...] = ()

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """By how many layers' routed experts each lacks: 0, 1, and so on."""
        return self.full, self.partial, *self.deeper

    @classmethod
    def of(cls, sums: Iterable[Tensor]) -> Streams:
        full, partial, *deeper = sums
        return cls(full, partial, tuple(deeper))

    @classmethod
    def before_layers(cls, embedding: Tensor, depth: int = 1) -> Streams:
        """What the first layer takes, for connectivities of at most that depth."""
        return cls.of(alias(embedding) for _ in range(depth + 1))


def alias(tensor: Tensor) -> Tensor:
    """The tensor as a reader of its own.

    Autograd adds the gradients of a tensor's readers in the reverse order of their making, and a schedule makes them
    in another order than the definition. So whoever skips something, or reads later, reads through an alias, and the
    aliases of a tensor are made before all its other readers: the order of additions is then that of the stock models.
    """
    return tensor.view_as(tensor)


def readers(tensor: Tensor, count: int) -> list[Tensor]:
    """``tensor`` for ``count`` single operations, of which two need no aliases: a sum of two is the same either way."""
    return [alias(tensor) if count > 2 else tensor for _ in range(count)]


def advance(
    streams: Streams,
    connectivity: Connectivity,
    attention: Callable[[Tensor], Tensor],
    mlp: Callable[[Tensor], tuple[Tensor | None, Tensor | None]],
    multiplier: float = 1.0,
    routed_last: bool = False,
) -> Streams:
    """One layer, without overlap: the oracle of everything that overlaps.

    streams: as deep as ``connectivity`` or deeper; the result is as deep.
    attention: norm and attention, from a stream to an output of the same shape.
    mlp: norm and MLP; returns ``(shared, routed)``. A dense layer returns ``(output, None)``, an MoE without shared
        experts ``(None, routed)``.
    multiplier: scales everything that is added to a stream, as in Granite.
    The order of additions, ``(full + attention) + (routed + shared)``, is that of the stock models, so that standard
    connectivity is bit-equal to them, gradients included; with ``routed_last`` it is
    ``((full + attention) + shared) + routed``.
    """

    def scaled(output: Tensor) -> Tensor:
        return output if multiplier == 1.0 else output * multiplier

    sums = streams.sums
    depth = len(sums) - 1
    attention_input, mlp_input = sums[connectivity.attention_lacks], sums[connectivity.mlp_lacks]
    if connectivity.attention_reads_partial:
        attention_input = alias(attention_input)
    if connectivity.mlp_reads_before_attention:
        mlp_input = alias(mlp_input)
    attended = readers(scaled(attention(attention_input)), depth)
    base, *partials = (before + each for before, each in zip(sums, attended, strict=False))
    partials = [alias(base), *partials]
    shared, routed = mlp(mlp_input if connectivity.mlp_reads_before_attention else base)
    if shared is not None:
        beside_routed, *alone = readers(shared, depth + 1)
        partials = [each + scaled(output) for each, output in zip(partials, alone, strict=True)]
    if routed is None:
        return Streams.of([partials[0], *partials])
    if routed_last:
        return Streams.of([partials[0] + scaled(routed), *partials])
    return Streams.of([base + scaled(routed if shared is None else routed + beside_routed), *partials])


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
