"""The expert-parallel MoE layer: router, dispatch, experts, combine; start and finish in two halves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from farskip_fused.errors import UsageError
from farskip_fused.expert_parallel import Pending
from farskip_fused.kernels import routing
from farskip_fused.kernels.machine import aligned
from farskip_fused.symmetric import SymmetricMemory
from farskip_fused.symmetric.slots import MINIMUM_DEPTH, Slots, SlotShape, open_slots

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INITIAL_STD = 0.02
WARM_UP_TOKENS = 4


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, bias: Tensor | None, options: dict[str, Any]) -> Any:
        experts, weights = routing.route_forward(logits, top_k, bias=bias, **options)
        ctx.mark_non_differentiable(experts)
        ctx.save_for_backward(logits, experts)
        ctx.options = {name: options[name] for name in ("sigmoid", "normalise", "scaling")}
        return experts, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, weights_gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, experts = ctx.saved_tensors
        return routing.route_backward(logits, experts, weights_gradient, **ctx.options), None, None, None


class Router(nn.Module):
    """Scores every expert for every token and chooses ``top_k``, in float32.

    scoring: "softmax" or "sigmoid". normalize_top_k: divide the chosen scores by their sum. routed_scaling: factor on
    the weights. num_groups, top_k_groups: choose only among the experts of the best groups (DeepSeek).
    correction_bias: a buffer ``e_score_correction_bias`` [E] added to the scores for the choice alone.
    Parameter: weight [E, H]. Must be the same on every rank.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: str = "softmax",
        normalize_top_k: bool = False,
        routed_scaling: float = 1.0,
        num_groups: int = 1,
        top_k_groups: int = 1,
        correction_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scoring not in ("softmax", "sigmoid"):
            raise UsageError(f"Unknown scoring {scoring!r}; use 'softmax' or 'sigmoid'.")
        if num_experts % num_groups:
            raise UsageError(f"{num_experts} experts do not divide into {num_groups} groups.")
        if not 1 <= top_k_groups <= num_groups or top_k > top_k_groups * (num_experts // num_groups):
            raise UsageError(
                f"top_k {top_k} does not fit into {top_k_groups} of {num_groups} groups of "
                f"{num_experts // num_groups} experts."
            )
        self.top_k = top_k
        self.options = {
            "sigmoid": scoring == "sigmoid",
            "normalise": normalize_top_k,
            "scaling": routed_scaling,
            "groups": num_groups,
            "top_groups": top_k_groups,
        }
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=INITIAL_STD)
        bias = torch.zeros(num_experts, device=device) if correction_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """From [T, H] to expert ids [T, K] int32 and weights [T, K] float32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = nn.functional.linear(hidden_states.float(), self.weight.float())
        return _Route.apply(logits, self.top_k, self.e_score_correction_bias, self.options)


class FusedExperts(nn.Module):
    """Experts split over the ranks of ``ep``, with routing from outside.

    hidden_size, intermediate_size, num_experts, top_k: the layer's shape, of any size; ``num_experts`` is a multiple of
        the world size, rank r holds experts [r * E_local, (r + 1) * E_local).
    ep: symmetric memory among the ranks, or None for one rank.
    max_tokens: most tokens that this rank, and any other, passes in one call.
    depth: rounds in flight, at least 2.
    Parameters: w13 [E_local, 2I, H], gate rows, then up rows; w2 [E_local, H, I].
    ``setup`` must be called, on every rank, before the first ``forward``.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        ep: SymmetricMemory | None = None,
        max_tokens: int,
        depth: int = MINIMUM_DEPTH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_experts": num_experts,
            "top_k": top_k, "max_tokens": max_tokens,
        }  # fmt: skip
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; an integer is needed.")
            if value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1.")
        if top_k > num_experts:
            raise UsageError(f"top_k is {top_k} and there are only {num_experts} experts; lower top_k.")
        world = 1 if ep is None else ep.world
        if num_experts % world:
            raise UsageError(f"{num_experts} experts do not divide over {world} ranks; choose a world size that does.")
        if ep is not None:
            if device is not None and torch.device(device).type != ep.device.type:
                raise UsageError(f"The layer's device is {device} and its symmetric memory is on {ep.device}.")
            device = ep.device
        dtype = dtype or torch.get_default_dtype()
        if dtype not in DTYPES:
            raise TypeError(f"The experts' dtype is {dtype}; use bfloat16, float16 or float32.")
        self.num_experts, self.top_k, self.ep = num_experts, top_k, ep
        self.slot_shape = SlotShape(max_tokens, hidden_size, top_k, dtype, depth)
        local = num_experts // world
        self.w13 = nn.Parameter(torch.empty(local, 2 * intermediate_size, hidden_size, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(local, hidden_size, intermediate_size, device=device, dtype=dtype))
        for weight in (self.w13, self.w2):
            nn.init.normal_(weight, std=INITIAL_STD)
        self._slots: Slots | None = None

    def size_hint(self) -> dict[str, int]:
        """Bytes of symmetric memory at each rank by region, and their "total"; allocates nothing."""
        regions = self.slot_shape.regions(1 if self.ep is None else self.ep.world)
        return {**regions, "total": sum(regions.values())}

    def setup(self) -> None:
        """Allocate the slots (shared with layers of the same shape) and load every kernel; collective.

        Kernels are loaded on a world of one: loading a module while another kernel waits for a peer deadlocks.
        Raises RuntimeError inside CUDA-graph capture.
        """
        if self.w13.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("setup() was called inside CUDA-graph capture; call it before.")
        if self.ep is None:
            self.ep = _local(self.w13.device)
        self._check_weights()
        scratch = _local(self.w13.device)
        self._warm_up(open_slots(scratch, replace(self.slot_shape, max_tokens=WARM_UP_TOKENS)))
        scratch.close()
        self._slots = open_slots(self.ep, self.slot_shape)
        self.ep.synchronize()
        self.ep.barrier()

    def _check_weights(self) -> None:
        for name, weight in (("w13", self.w13), ("w2", self.w2)):
            if weight.dtype != self.slot_shape.dtype:
                raise TypeError(
                    f"{name} is {weight.dtype} and the layer was made for {self.slot_shape.dtype}; give the dtype when "
                    "the layer is made."
                )
            if not weight.is_contiguous() or weight.data_ptr() % 16:
                raise UsageError(f"{name} must be contiguous and aligned to 16 bytes; assign a clone of it.")
            if self.ep is not None and weight.device != self.ep.device:
                raise UsageError(f"{name} is on {weight.device}, its symmetric memory on {self.ep.device}.")

    def _warm_up(self, slots: Slots) -> None:
        device, dtype = self.w13.device, self.slot_shape.dtype
        tokens, local = WARM_UP_TOKENS, self.w13.shape[0]
        ids = torch.arange(self.top_k, dtype=torch.int32, device=device)
        ids = torch.where(ids < local, ids, -1).expand(tokens, -1).contiguous()
        with torch.enable_grad():
            x = torch.zeros(tokens, self.slot_shape.hidden_size, device=device, dtype=dtype, requires_grad=True)
            weights = torch.ones(tokens, self.top_k, device=device, requires_grad=True)
            w13, w2 = self.w13.detach().requires_grad_(), self.w2.detach().requires_grad_()
            y = Pending(slots, x, ids, weights, w13, w2).finish()
            torch.autograd.grad(y.sum(), (x, weights, w13, w2))
        slots.memory.synchronize()

    def dispatch(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Pending:
        """Launch the dispatch of [T, H] to experts [T, K] (-1: not routed) with weights [T, K]; returns at once.

        Raises RuntimeError before ``setup``, TypeError for a wrong dtype, UsageError for a wrong shape or device, for
        more than ``max_tokens`` tokens and, on CPU, for ids out of range. A GPU finds those itself: a later call
        reports them, and the symmetric memory is then of no further use.
        """
        if self._slots is None:
            raise RuntimeError("The layer is not set up; call setup() on every rank before the first forward.")
        self._check_weights()
        self._check_input(hidden_states)
        tokens = hidden_states.shape[0]
        if top_k_index.shape != (tokens, self.top_k) or top_k_weights.shape != (tokens, self.top_k):
            raise UsageError(
                f"Expert ids {list(top_k_index.shape)} and weights {list(top_k_weights.shape)} were given; "
                f"both must be [{tokens}, {self.top_k}]."
            )
        if top_k_index.is_floating_point() or not top_k_weights.is_floating_point():
            raise TypeError(
                f"Expert ids of {top_k_index.dtype} and weights of {top_k_weights.dtype} were given; ids must be "
                "integers and weights floating point."
            )
        for name, tensor in (("Expert ids", top_k_index), ("Weights", top_k_weights)):
            if tensor.device != self.w13.device:
                raise UsageError(f"{name} on {tensor.device} were given, experts on {self.w13.device}.")
        if not top_k_index.is_cuda and not bool(((top_k_index >= -1) & (top_k_index < self.num_experts)).all()):
            raise UsageError(
                f"Expert ids from {int(top_k_index.min())} to {int(top_k_index.max())} were given; they must be from 0 "
                f"to {self.num_experts - 1}, or -1 for not routed."
            )
        if top_k_index.dtype != torch.int32:
            limits = torch.iinfo(torch.int32)  # beyond them an id out of range would wrap around to a valid one
            top_k_index = top_k_index.clamp(limits.min, limits.max).to(torch.int32)
        return Pending(
            self._slots, aligned(hidden_states), aligned(top_k_index), aligned(top_k_weights.float()), self.w13, self.w2
        )

    def _check_input(self, hidden_states: Tensor) -> None:
        shape, expected = hidden_states.shape, self.slot_shape
        if hidden_states.dim() != 2 or shape[1] != expected.hidden_size:
            raise UsageError(f"Hidden states {list(shape)} were given; [tokens, {expected.hidden_size}] is needed.")
        if hidden_states.dtype != expected.dtype:
            raise TypeError(f"Hidden states of {hidden_states.dtype} were given; the experts are {expected.dtype}.")
        if hidden_states.device != self.w13.device:
            raise UsageError(f"Hidden states on {hidden_states.device} were given, experts on {self.w13.device}.")
        if shape[0] > expected.max_tokens:
            raise UsageError(f"{shape[0]} tokens were given; max_tokens is {expected.max_tokens}, raise it or split.")

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts, [T, H]; the call that transformers makes of its experts."""
        return self.dispatch(hidden_states, top_k_index, top_k_weights).finish()


class FusedMoE(FusedExperts):
    """Router and experts: from hidden states [..., H] to the routed experts' output of the same shape.

    Arguments as for ``FusedExperts`` and ``Router``. Attribute ``gate``: the router.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        ep: SymmetricMemory | None = None,
        max_tokens: int,
        depth: int = MINIMUM_DEPTH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **routing_options: Any,
    ) -> None:
        super().__init__(
            hidden_size, intermediate_size, num_experts, top_k,
            ep=ep, max_tokens=max_tokens, depth=depth, device=device, dtype=dtype,
        )  # fmt: skip
        self.gate = Router(
            hidden_size, num_experts, top_k, device=self.w13.device, dtype=self.w13.dtype, **routing_options
        )

    def _warm_up(self, slots: Slots) -> None:
        super()._warm_up(slots)
        with torch.enable_grad():
            x = torch.zeros(WARM_UP_TOKENS, self.slot_shape.hidden_size, device=self.w13.device, dtype=self.w13.dtype)
            _, weights = self.gate(x.requires_grad_())
            torch.autograd.grad(weights.sum(), x)

    def start(self, hidden_states: Tensor) -> Pending:
        """Gate, routing and the launch of dispatch; returns at once."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        self._check_input(flat)
        pending = self.dispatch(flat, *self.gate(flat))
        pending.output_shape = hidden_states.shape
        return pending

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """``start``, ``experts`` and ``finish`` in one."""
        return self.start(hidden_states).finish()


def _local(device: torch.device) -> SymmetricMemory:
    from farskip_fused.symmetric.local import LocalMemory

    return LocalMemory(device, timeout=60.0)
