"""Decoder layers of tensor-parallel inference, run by their schedule: every rank has all tokens, and a share of the
attention heads, of the experts and of the shared experts' intermediate size; partial outputs are summed over the ranks.

With FarSkip connectivity attention and shared experts share one all-reduce, which hides behind the routed experts, and
that of the routed experts hides behind the next attention (arXiv 2511.11505, on inference). The plain definition is
``connectivity.advance`` on one rank; sums over ranks round otherwise, but every rank gets the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from farskip_fused.all_reduce import AllReduce, PendingSum
from farskip_fused.checks import check_experts, check_hidden_states, check_sizes
from farskip_fused.connectivity import Connectivity
from farskip_fused.errors import UsageError
from farskip_fused.local_experts import LocalPending, arrange_entries, new_experts
from farskip_fused.router import Router
from farskip_fused.schedule import TENSOR_PARALLEL_CONNECTIVITIES, tensor_parallel_order
from farskip_fused.symmetric import SymmetricMemory

if TYPE_CHECKING:
    from farskip_fused.layer import SplitAttention


class SplitMoE(nn.Module):
    """Router and this rank's share of the experts; its output is this rank's part of a sum over ranks.

    hidden_size, intermediate_size, num_experts, top_k: of the whole layer; ``num_experts`` is a multiple of the world
        size, rank r holds experts [r * E_local, (r + 1) * E_local).
    memory: among the ranks that split it. dtype: of the weights, None for torch's default. routing_options: of
        ``Router``.
    Parameters: gate.weight [E, H], the same at every rank; w13 [E_local, 2I, H], gate rows, then up rows;
        w2 [E_local, H, I]; on the device of ``memory``.
    Raises UsageError or TypeError for impossible sizes.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        memory: SymmetricMemory,
        dtype: torch.dtype | None = None,
        **routing_options: Any,
    ) -> None:
        super().__init__()
        dtype, device = dtype or torch.get_default_dtype(), memory.device
        sizes = {
            "hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_experts": num_experts,
            "top_k": top_k,
        }  # fmt: skip
        check_sizes(sizes, memory.world, dtype)
        local = num_experts // memory.world
        self.first_expert = memory.rank * local
        self.gate = Router(hidden_size, num_experts, top_k, device=device, dtype=dtype, **routing_options)
        self.w13, self.w2 = new_experts(local, hidden_size, intermediate_size, device, dtype)

    def start(self, hidden_states: Tensor) -> LocalPending:
        """Gate and routing of [..., H], the same at every rank; ``finish()`` of what it returns runs the experts."""
        check_experts(self.w13, self.w2, transposed=False)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        check_hidden_states(rows, self.w13.shape[2], self.w13)
        ids, weights = self.gate(rows)
        ids = ids - self.first_expert
        ids = torch.where((ids >= 0) & (ids < len(self.w13)), ids, -1)
        pending = LocalPending(rows, arrange_entries(rows, ids, self.w13), weights, self.w13, self.w2)
        pending.output_shape = hidden_states.shape
        return pending

    def forward(self, hidden_states: Tensor) -> Tensor:
        """This rank's part of the routed experts' output, shaped as the input."""
        return self.start(hidden_states).finish()


class SplitMLP(nn.Module):
    """A SwiGLU MLP, such as shared experts, with this rank's share of the intermediate size.

    hidden_size, intermediate_size: of the whole MLP. memory: among the ranks that split it. dtype: of the weights, None
        for torch's default.
    Parameters: gate_up.weight [2 I / W, H], the rank's gate rows, then its up rows; down.weight [H, I / W].
    Raises UsageError if the intermediate size does not divide over the ranks.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, memory: SymmetricMemory, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if intermediate_size % memory.world:
            raise UsageError(f"An intermediate size of {intermediate_size} does not divide over {memory.world} ranks.")
        local = intermediate_size // memory.world
        self.gate_up = nn.Linear(hidden_size, 2 * local, bias=False, device=memory.device, dtype=dtype)
        self.down = nn.Linear(local, hidden_size, bias=False, device=memory.device, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """This rank's part of the output, from [..., H], shaped as the input."""
        gate, up = self.gate_up(hidden_states).chunk(2, dim=-1)
        output: Tensor = self.down(nn.functional.silu(gate) * up)
        return output


class ReducedCarry:
    """What travels between layers: the residual stream, and sums in flight that are still to be added to it.

    lacks_shared: whether the stream without the newest sum of routed experts lacks shared experts too.
    """

    def __init__(self, stream: Tensor) -> None:
        self.stream = stream
        self.lacks_shared = False
        self._ahead: list[_Addition] = []

    def add(self, name: str, pending: PendingSum) -> _Addition:
        """Let ``pending`` be the next sum to be added."""
        stream = self.stream
        addition = _Addition(name, self._ahead[-1].stream if self._ahead else lambda: stream, pending)
        self._ahead.append(addition)
        return addition

    def advance(self, name: str) -> None:
        """Let the stream have the sums up to the one of that name; if there is none, it has it already.

        Who waits for the routed experts waits for everything so far: in a dense layer's sum they are not, and it may be
        the newest all the same.
        """
        if name == "expert_reduce":
            self.full()
        while any(addition.name == name for addition in self._ahead):
            self.stream = self._ahead.pop(0).stream()

    def full(self) -> Tensor:
        """Everything summed; waits for all that is in flight."""
        if self._ahead:
            self.stream = self._ahead[-1].stream()
            self._ahead.clear()
        return self.stream


class _Addition:
    """The stream once a sum has been added to it."""

    def __init__(self, name: str, before: Callable[[], Tensor], pending: PendingSum) -> None:
        self.name, self._before, self._pending = name, before, pending
        self._stream: Tensor | None = None

    def stream(self) -> Tensor:
        """The first call waits."""
        if self._stream is None:
            self._stream = self._pending.finish(residual=self._before())
        return self._stream


class TensorParallelLayer(nn.Module):
    """Attention and MoE of tensor-parallel inference; every sub-layer's output is this rank's part of a sum over ranks.

    attention: this rank's heads, a module with ``project`` and ``attend`` (``layer.SplitAttention``).
    moe: a ``SplitMoE``, or None in a dense layer. shared_experts: a module on the MoE's normed input, such as
        ``SplitMLP``, or None; in a dense layer its MLP. attention_norm, moe_norm: whole, the same at every rank.
    all_reduce: set up, of depth 2 or more; the layers of a model may share one.
    connectivity: farskip or standard. next_reads_partial: give True to a layer of standard connectivity with shared
        experts, or a dense one, that comes before one of FarSkip's; its shared experts get an all-reduce of their own.
    blocking: wait for each all-reduce where it is launched; the results are the same, up to cuBLAS's choice of kernels
        beside one (``SymmetricMemory.tells_libraries``).
    The first layer takes the embedding [..., H], each other one the ``ReducedCarry`` before it, which it uses up; the
    final norm takes ``carry.full()``. Every rank must run the same layers in the same order, under torch.no_grad().
    Raises TypeError for an attention or MoE without these methods, UsageError for another connectivity.
    """

    def __init__(
        self,
        attention: nn.Module,
        moe: nn.Module | None,
        *,
        attention_norm: nn.Module,
        moe_norm: nn.Module,
        all_reduce: AllReduce,
        shared_experts: nn.Module | None = None,
        connectivity: Connectivity | str = "farskip",
        next_reads_partial: bool = False,
        blocking: bool = False,
    ) -> None:
        super().__init__()
        for owner, method in ((attention, "project"), (attention, "attend"), *([(moe, "start")] if moe else [])):
            if not callable(getattr(owner, method, None)):
                raise TypeError(
                    f"{type(owner).__name__} has no method {method}(); TensorParallelLayer says what it takes."
                )
        self.connectivity = Connectivity.named(connectivity)
        if self.connectivity not in map(Connectivity.named, TENSOR_PARALLEL_CONNECTIVITIES):
            raise UsageError(
                f"{self.connectivity} was asked for; tensor-parallel layers have one of "
                f"{', '.join(TENSOR_PARALLEL_CONNECTIVITIES)}."
            )
        self.attention, self.moe, self.shared_experts = attention, moe, shared_experts
        self.attention_norm, self.moe_norm = attention_norm, moe_norm
        self.all_reduce, self.next_reads_partial, self.blocking = all_reduce, next_reads_partial, blocking

    def forward(self, carry: ReducedCarry | Tensor) -> ReducedCarry:
        """carry: what the layer before returned, or the embedding [..., H].

        Raises UsageError if this layer's attention reads a stream that the layer before cannot give, see
        ``next_reads_partial``, and what ``AllReduce.start`` raises.
        """
        run = _Pass(self, ReducedCarry(carry) if isinstance(carry, Tensor) else carry)
        for action in tensor_parallel_order(self.connectivity, self.next_reads_partial):
            if action.waits_for is not None:
                run.carry.advance(action.waits_for[0])
            getattr(run, action.name)()
            if action.launches is not None:
                run.launch(action.launches[0])
        return run.carry


class _Pass:
    """One forward pass of a layer; a method for each action of the schedule."""

    def __init__(self, layer: TensorParallelLayer, carry: ReducedCarry) -> None:
        if layer.connectivity.attention_reads_partial and carry.lacks_shared:
            raise UsageError(
                "This layer's attention reads the stream without the routed experts of the layer before, which sums "
                "them together with its shared experts; make that layer with next_reads_partial=True."
            )
        self.layer, self.carry = layer, carry
        self.attention, self.moe = cast("SplitAttention", layer.attention), cast("SplitMoE | None", layer.moe)
        self.unsent: dict[str, Tensor] = {}  # partial outputs by action

    def attention_projections(self) -> None:
        self.projected = self.attention.project(self.layer.attention_norm(self.carry.stream))

    def attention_core(self) -> None:
        self.unsent["attention"] = self.attention.attend(self.projected)

    def gate(self) -> None:
        self.moe_input = self.layer.moe_norm(self.carry.stream)
        self.pending = None if self.moe is None else self.moe.start(self.moe_input)

    def shared_experts(self) -> None:
        if self.layer.shared_experts is not None:
            self.unsent["shared"] = self.layer.shared_experts(self.moe_input)

    def experts(self) -> None:
        if self.pending is not None:
            self.unsent["routed"] = self.pending.finish()

    def launch(self, name: str) -> None:
        """Start the sum over ranks of all partial outputs that have not left yet."""
        if name == "expert_reduce":
            self.carry.lacks_shared = "shared" in self.unsent
        if self.unsent:
            first, *others = self.unsent.values()
            addition = self.carry.add(name, self.layer.all_reduce.start(sum(others, first)))
            if self.layer.blocking:
                addition.stream()
        self.unsent = {}
