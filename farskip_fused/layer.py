"""The decoder layer that runs its schedule: communication of one layer is in flight while the next one computes.

The plain definition is ``connectivity.advance``; this path performs the same additions in the same order, so that the
two agree bit for bit when the sub-layers are deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import Tensor, nn

from farskip_fused.connectivity import Connectivity
from farskip_fused.moe import FusedMoE
from farskip_fused.schedule import forward_order


class SplitAttention(Protocol):
    """Attention in two halves, so that dispatch can be launched between them; a module with these methods."""

    def project(self, hidden_states: Tensor) -> Any:
        """Queries, keys and values of [..., H]."""

    def attend(self, projected: Any) -> Tensor:
        """Core attention and output projection, [..., H]."""


class Carry:
    """What travels between layers: ``partial``, and the full stream, perhaps with routed experts still in flight."""

    def __init__(self, partial: Tensor, finish: Callable[[], Tensor] | None = None) -> None:
        self.partial = partial
        self._finish = finish
        self._full = partial if finish is None else None

    def full(self) -> Tensor:
        """Everything summed, of the shape of ``partial``; the first call waits for the combine."""
        if self._full is None:
            assert self._finish is not None
            self._full = self._finish()
        return self._full


class OverlappedLayer(nn.Module):
    """Attention and MoE with either's communication behind the other's computation.

    attention: a module that is a ``SplitAttention``. moe: set up before the first forward. shared_experts: a module on
    the MoE's normed input, or None. The first layer takes the embedding, the final norm takes ``carry.full()``.
    Every rank must run the same layers in the same order.
    """

    def __init__(
        self,
        attention: nn.Module,
        moe: FusedMoE,
        *,
        attention_norm: nn.Module,
        moe_norm: nn.Module,
        shared_experts: nn.Module | None = None,
        connectivity: Connectivity | str = "farskip",
    ) -> None:
        super().__init__()
        for method in ("project", "attend"):
            if not callable(getattr(attention, method, None)):
                raise TypeError(
                    f"{type(attention).__name__} has no method {method}(); SplitAttention says what it does."
                )
        self.attention, self.moe, self.shared_experts = attention, moe, shared_experts
        self.attention_norm, self.moe_norm = attention_norm, moe_norm
        self.connectivity = Connectivity.named(connectivity)

    def forward(self, carry: Carry | Tensor) -> Carry:
        run = _Pass(self, Carry(carry) if isinstance(carry, Tensor) else carry)
        for action in forward_order(self.connectivity):
            getattr(run, action.name)()
        return run.result()


class _Pass:
    """One forward pass of a layer; a method for each action of the schedule."""

    def __init__(self, layer: OverlappedLayer, carry: Carry) -> None:
        self.layer, self.carry = layer, carry
        self.attention = cast(SplitAttention, layer.attention)
        self.shared: Tensor | None = None

    def finish_combine(self) -> None:
        self.before = self.carry.full()

    def attention_projections(self) -> None:
        reads_partial = self.layer.connectivity.attention_reads_partial
        stream = self.carry.partial if reads_partial else self.before
        self.projected = self.attention.project(self.layer.attention_norm(stream))

    def attention_core(self) -> None:
        self.attended = self.attention.attend(self.projected)

    def start_dispatch(self) -> None:
        reads_before = self.layer.connectivity.mlp_reads_before_attention
        self.moe_input = self.layer.moe_norm(self.before if reads_before else self.before + self.attended)
        self.pending = self.layer.moe.start(self.moe_input)

    def experts(self) -> None:
        self.pending.experts()

    def shared_experts(self) -> None:
        if self.layer.shared_experts is not None:
            self.shared = self.layer.shared_experts(self.moe_input)

    def result(self) -> Carry:
        base, shared, pending = self.before + self.attended, self.shared, self.pending
        if shared is None:
            return Carry(base, lambda: base + pending.finish())
        return Carry(base + shared, lambda: base + (pending.finish() + shared))
