"""The decoder layer that runs its schedule: communication of one layer is in flight while others compute.

The plain definition is ``connectivity.advance``; this path performs the same additions in the same order, forward and
backward, so that the two agree bit for bit, gradients included, when the sub-layers are deterministic. On a GPU this
needs ``SymmetricMemory.tells_libraries = False``: cuBLAS may else choose other kernels beside communication than alone.

Backward needs no scheduler of its own. Of the nodes that are ready autograd runs the one made last, and as forward
makes them in the order of ``schedule.forward_order``, backward runs in that of ``schedule.backward_order``
(docs/portability.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from farskip_fused.connectivity import Connectivity, Streams, advance, alias, readers
from farskip_fused.errors import UsageError
from farskip_fused.expert_parallel import Pending
from farskip_fused.local_experts import LocalPending, is_recomputing
from farskip_fused.moe import FusedMoE
from farskip_fused.schedule import forward_order


class SplitAttention(Protocol):
    """Attention in two halves, so that dispatch can be launched between them; a module with these methods."""

    def project(self, hidden_states: Tensor) -> Any:
        """Queries, keys and values of [..., H]."""

    def attend(self, projected: Any) -> Tensor:
        """Core attention and output projection, [..., H]."""


class _Sum:
    """A tensor, or what computes it when it is first read."""

    def __init__(self, value: Tensor | Callable[[], Tensor]) -> None:
        self._value = value

    def __call__(self) -> Tensor:
        if not isinstance(self._value, Tensor):
            self._value = self._value()
        return self._value

    def plus(self, other: Tensor) -> _Sum:
        return _Sum(lambda: self() + other)

    def alias(self) -> _Sum:
        return _Sum(lambda: alias(self()))


class Carry:
    """What travels between layers: the sums of ``connectivity.Streams``, some with routed experts still in flight."""

    def __init__(self, embedding: Tensor, depth: int = 1) -> None:
        """embedding: [..., H], what the first layer reads. depth: the largest ``Connectivity.depth`` of the layers."""
        self._sums: Sequence[_Sum] = [_Sum(each) for each in Streams.before_layers(embedding, depth).sums]
        self._pending: Pending | LocalPending | None = None
        self._launched_by: object | None = None

    @classmethod
    def _after(cls, sums: Sequence[_Sum], pending: Pending | LocalPending | None) -> Carry:
        """pending: of the layer that made this, if its schedule leaves the launch of its experts to the next one."""
        carry = cls.__new__(cls)
        carry._sums, carry._pending, carry._launched_by = sums, pending, None
        return carry

    @property
    def depth(self) -> int:
        """The largest depth of layers that can take it."""
        return len(self._sums) - 1

    def full(self) -> Tensor:
        """Everything summed, [..., H]; the first call waits for what is in flight."""
        self._launch_experts(self)
        return self._sums[0]()

    def _launch_experts(self, launcher: object) -> None:
        """Launch experts that were left to the next layer: by that one in its turn or, after the last, by the carry.

        Once more when the activations of that turn are recomputed: what the experts' backward pass needs was saved
        there.
        """
        again = self._launched_by is launcher and is_recomputing()
        if self._pending is None or (self._launched_by is not None and not again):
            return
        self._launched_by = launcher
        self._pending.experts()


class OverlappedLayer(nn.Module):
    """Attention and MoE with either's communication behind the other's computation.

    attention: a module that is a ``SplitAttention``. moe: set up before the first forward, its ``depth`` at least one
    more than that of the connectivity, with activation checkpointing (which must be non-reentrant) at least twice that.
    attention_norm, moe_norm: modules, [..., H] to [..., H]. shared_experts: a module on the MoE's normed input or None.
    connectivity: a ``Connectivity`` or its name. The first layer takes the embedding, the final norm takes
    ``carry.full()``. Every rank must run the same layers in the same order.
    Raises TypeError for an attention without these methods, UsageError for a MoE with too few slots.
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
        self._check_slots(self.connectivity.depth + 1, "")

    def _check_slots(self, needed: int, why: str) -> None:
        slots = self.moe.slot_shape.depth
        if not self.moe.is_alone and slots < needed:
            raise UsageError(
                f"The MoE has slots for {slots} rounds in flight and connectivity depth {self.connectivity.depth}{why} "
                f"needs {needed}; make it with depth={needed}."
            )

    def forward(self, carry: Carry | Tensor) -> Carry:
        """carry: what the layer before returned, or the embedding; where a later layer is deeper than the first,
        ``Carry(embedding, depth)``.

        Raises UsageError for a carry of layers less deep than this one, and if FSDP shards the layer as a whole.
        """
        depth = self.connectivity.depth
        if any(base.__name__ == "FSDPModule" for base in type(self).__mro__):
            raise UsageError(
                "The layer was given to fully_shard as a whole, whose hooks need tensors where a Carry comes and goes; "
                "shard its attention and shared experts instead."
            )
        if isinstance(carry, Tensor):
            carry = Carry(carry, depth)
        if carry.depth < depth:
            raise UsageError(
                f"A layer of depth {depth} was given what layers of depth {carry.depth} carry; give the first layer "
                f"Carry(embedding, depth={depth})."
            )
        if is_recomputing():
            # A round of gradients is open for ``depth`` turns, in each of which another one opens and one recomputes.
            self._check_slots(2 * depth, " with activation checkpointing")
        turn = _Turn(self, carry)
        for action in forward_order(self.connectivity):
            if action.layer == 0:
                getattr(turn, action.name)()
            else:
                carry._launch_experts(self)
        return turn.result()

    def reference(self, streams: Streams) -> Streams:
        """The layer by its plain definition: it waits wherever it communicates. First: ``Streams.before_layers``."""

        def attention(stream: Tensor) -> Tensor:
            halves = cast(SplitAttention, self.attention)
            return halves.attend(halves.project(self.attention_norm(stream)))

        def mlp(stream: Tensor) -> tuple[Tensor | None, Tensor]:
            normed = self.moe_norm(stream)
            routed = self.moe(normed)  # first, as in the schedule: gradients of the normed stream are added in reverse
            return None if self.shared_experts is None else self.shared_experts(normed), routed

        return advance(streams, self.connectivity, attention, mlp)


class _Turn:
    """One forward pass of a layer; a method for each action of the schedule. Aliases are those of ``advance``."""

    def __init__(self, layer: OverlappedLayer, carry: Carry) -> None:
        self.layer, self.carry, self.connectivity = layer, carry, layer.connectivity
        self.attention = cast(SplitAttention, layer.attention)
        self.leaves_experts = self.connectivity.depth > 1
        self.shared: Tensor | None = None

    def finish_combine(self) -> None:
        if not self.leaves_experts:
            self.carry._launch_experts(self.layer)  # a deeper layer may have left its own
        self.moe_input = self.carry._sums[self.connectivity.mlp_lacks]()
        if self.connectivity.mlp_reads_before_attention:
            self.moe_input = alias(self.moe_input)

    def attention_projections(self) -> None:
        stream = self.carry._sums[self.connectivity.attention_lacks]()
        if self.connectivity.attention_reads_partial:
            stream = alias(stream)
        self.projected = self.attention.project(self.layer.attention_norm(stream))

    def attention_core(self) -> None:
        attended = readers(self.attention.attend(self.projected), self.carry.depth)
        self.base, *deeper = (before.plus(each) for before, each in zip(self.carry._sums, attended, strict=False))
        self.partials = [self.base.alias(), *deeper]

    def start_dispatch(self) -> None:
        if not self.connectivity.mlp_reads_before_attention:
            self.moe_input = self.base()
            self.partials[0]()  # computed now, for its alias
        self.normed = self.layer.moe_norm(self.moe_input)
        # Where the next layer launches the experts, it is its recomputation that needs the dispatch again.
        self.pending = self.layer.moe.start(self.normed, hold=self.leaves_experts and is_recomputing())

    def experts(self) -> None:
        self.pending.experts()

    def shared_experts(self) -> None:
        if self.layer.shared_experts is not None:
            self.shared = self.layer.shared_experts(self.normed)

    def result(self) -> Carry:
        base, partials, pending, beside_routed = self.base, self.partials, self.pending, None
        if self.shared is not None:
            beside_routed, *alone = readers(self.shared, self.carry.depth + 1)
            partials = [each.plus(shared) for each, shared in zip(partials, alone, strict=True)]
        full = _Sum(lambda: pending.finish(shared=beside_routed, residual=base()))
        return Carry._after([full, *partials], pending if self.leaves_experts else None)
