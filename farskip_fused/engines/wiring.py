"""What each decoder layer of a served model reads and leaves, from config.json. Free of torch and of any engine.

Engines hand two tensors from layer to layer, ``(hidden_states, residual)``, whose sum is the residual stream. The same
pair carries FarSkip's two streams: ``full`` is their sum as ever, and where the next layer's attention reads
``partial``, ``residual`` alone is that, ``hidden_states`` being the routed experts' output. So the model around the
layers, its last norm included, stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from farskip_fused.connectivity import Connectivity
from farskip_fused.errors import UsageError
from farskip_fused.record import from_record


@dataclass(frozen=True)
class Wiring:
    """One decoder layer.

    is_moe: its MLP has experts.
    reads_partial: its attention reads ``residual`` alone, which the layer before has kept free of routed experts.
    mlp_first: its MLP reads the full stream from before its own attention.
    splits: it returns its routed experts' output as ``hidden_states`` and adds all else to ``residual``; otherwise
        it returns the stock layer's pair, MLP output and the stream before it.
    """

    is_moe: bool
    reads_partial: bool
    mlp_first: bool
    splits: bool

    @property
    def is_stock(self) -> bool:
        """Whether the stock layer does the same."""
        return not (self.reads_partial or self.mlp_first or self.splits)


def read_wirings(record: Any, is_moe: Sequence[bool]) -> list[Wiring]:
    """The layers of a converted checkpoint.

    record: the ``"farskip"`` entry of its configuration; is_moe: which layers have experts.
    Raises UsageError for a record that this package does not read, and for depth 2 or 3, which needs more streams.
    """
    connectivity, converted = from_record(record, len(is_moe))
    if connectivity.depth > 1:
        raise UsageError(
            f"The checkpoint was converted with depth {connectivity.depth}; serving engines run depth 1, so convert "
            "and distil it with that."
        )
    return wirings([connectivity if i in converted else Connectivity.standard() for i in range(len(is_moe))], is_moe)


def wirings(connectivities: Sequence[Connectivity], is_moe: Sequence[bool]) -> list[Wiring]:
    """The layers of a model, given the connectivity of each and which of them have experts.

    Both streams are the same before the first layer and after a dense one: an attention there reads the full stream.
    """
    count = len(is_moe)
    reads_partial = [i > 0 and is_moe[i - 1] and connectivities[i].attention_reads_partial for i in range(count)]
    return [
        Wiring(
            is_moe=is_moe[i],
            reads_partial=reads_partial[i],
            mlp_first=connectivities[i].mlp_reads_before_attention,
            splits=i + 1 < count and reads_partial[i + 1],
        )
        for i in range(count)
    ]
