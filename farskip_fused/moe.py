"""The MoE layer, on one rank or expert-parallel: router, dispatch, experts, combine; start and finish in two halves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from farskip_fused import tuning
from farskip_fused.checks import (
    check_experts,
    check_hidden_states,
    check_not_capturing,
    check_routing,
    check_sizes,
    check_tokens,
    to_global_ids,
)
from farskip_fused.errors import UsageError
from farskip_fused.exchange_setup import ExchangeOptions, set_up, size_hint, warm_up_ids
from farskip_fused.expert_parallel import Pending
from farskip_fused.flight import Exchange
from farskip_fused.kernels.layout import Layout
from farskip_fused.kernels.machine import aligned
from farskip_fused.local_experts import LocalPending, arrange_entries, new_experts
from farskip_fused.router import Router
from farskip_fused.symmetric import SymmetricMemory
from farskip_fused.symmetric.slots import MINIMUM_DEPTH, SlotShape


class FusedExperts(nn.Module):
    """Experts split over the ranks of ``ep``, with routing from outside.

    hidden_size, intermediate_size, num_experts, top_k: the layer's shape, of any size; ``num_experts`` is a multiple of
        the world size, rank r holds experts [r * E_local, (r + 1) * E_local).
    ep: symmetric memory among the ranks, or None for one rank, which needs none: there, what follows about
        ``max_tokens``, ``depth`` and ``setup`` binds nobody, and torch.compile(fullgraph=True) takes the layer.
    max_tokens: most tokens that this rank, and any other, passes in one call.
    depth: rounds in flight, at least 2.
    exchange: how rows travel between the ranks.
    accumulate_into_main_grad: backward adds the weights' gradients to their attribute ``main_grad``, a contiguous
        floating-point tensor of their shape (the convention of Megatron and TransformerEngine), and leaves ``grad``
        as it is. Compiled, a micro-batch's backward must come before the next one's forward.
    device, dtype: of the weights; by default those of ``ep`` and torch's default dtype.
    Parameters: w13 [E_local, 2I, H], gate rows, then up rows; w2 [E_local, H, I].
    ``setup`` must be called, on every rank, before the first ``forward``.
    Raises UsageError or TypeError for impossible sizes, and for a device that is not that of ``ep``.
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
        exchange: ExchangeOptions | None = None,
        accumulate_into_main_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_experts": num_experts,
            "top_k": top_k, "max_tokens": max_tokens,
        }  # fmt: skip
        world = 1 if ep is None else ep.world
        dtype = dtype or torch.get_default_dtype()
        check_sizes(sizes, world, dtype)
        if ep is not None:
            if device is not None and torch.device(device).type != ep.device.type:
                raise UsageError(f"The layer's device is {device} and its symmetric memory is on {ep.device}.")
            device = ep.device
        self.num_experts, self.top_k, self.ep = num_experts, top_k, ep
        self.accumulate_into_main_grad = accumulate_into_main_grad
        self.exchange_options = exchange or ExchangeOptions()
        planes = 1 if self.exchange_options.keep_received else 2
        self.slot_shape = SlotShape(
            max_tokens, hidden_size, top_k, dtype, depth,
            planes=planes, fp8=self.exchange_options.fp8, staged=ep is not None and ep.by_put,
        )  # fmt: skip
        self.w13, self.w2 = new_experts(num_experts // world, hidden_size, intermediate_size, device, dtype)
        self._exchange: Exchange | None = None
        self._is_set_up = ep is None

    @property
    def is_alone(self) -> bool:
        """Whether all experts are here: nothing travels, and the path of one rank is taken."""
        return self.ep is None or self.ep.world == 1

    def size_hint(self) -> dict[str, int]:
        """Bytes of symmetric memory at each rank by region, and their "total"; allocates nothing."""
        return {"total": 0} if self.ep is None or self.is_alone else size_hint(self.slot_shape, self.ep.world)

    def setup(self) -> None:
        """Allocate the slots (shared with layers of the same shape) and load every kernel; collective.

        With ``ep`` None there is nothing to allocate or wait for, and only the weights are checked.
        Raises RuntimeError inside CUDA-graph capture.
        """
        check_not_capturing(self.w13.device)
        self._check_weights()
        self._is_set_up = True
        if self.ep is not None and not self.is_alone:
            self._exchange = set_up(self.ep, self.slot_shape, self.num_experts, self.exchange_options, self._warm_up)

    def _check_weights(self) -> None:
        check_experts(self.w13, self.w2, transposed=False)
        if self.ep is None:
            return
        for name, weight in (("w13", self.w13), ("w2", self.w2)):
            if weight.dtype != self.slot_shape.dtype:
                raise TypeError(
                    f"{name} is {weight.dtype} and the layer was made for {self.slot_shape.dtype}; give the dtype when "
                    "the layer is made."
                )
            if weight.data_ptr() % 16:
                raise UsageError(f"{name} must be aligned to 16 bytes; assign a clone of it.")
            if weight.device != self.ep.device:
                raise UsageError(f"{name} is on {weight.device}, its symmetric memory on {self.ep.device}.")

    def _warm_up(self, exchange: Exchange) -> None:
        """Launch every variant of every kernel once, with backward and without."""
        device, dtype = self.w13.device, self.slot_shape.dtype
        ids = warm_up_ids(exchange)
        w13, w2 = (weight.detach().requires_grad_() for weight in (self.w13, self.w2))
        added = {torch.float32, dtype} if self.accumulate_into_main_grad else set()
        for has_backward, added_dtype in [(False, None), (True, None), *((True, each) for each in added)]:
            main_grads = None
            if added_dtype is not None:
                main_grads = [torch.empty_like(weight, dtype=added_dtype) for weight in (w13, w2)]
            with torch.set_grad_enabled(has_backward):
                x = torch.zeros(len(ids), self.slot_shape.hidden_size, device=device, dtype=dtype, requires_grad=True)
                weights = torch.ones(ids.shape, device=device, requires_grad=True)
                for shared, residual in ((None, None), (x, None), (None, x), (x, x)):
                    pending = Pending(exchange, x, ids, weights, w13, w2, main_grads)
                    y = pending.finish(shared=shared, residual=residual)
                if has_backward:
                    y.sum().backward()

    def dispatch(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, hold: bool = False
    ) -> Pending | LocalPending:
        """Launch the dispatch of [T, H] to experts [T, K] (-1: not routed) with weights [T, K]; returns at once.

        hidden_states: of the layer's dtype. top_k_index: integers. top_k_weights: floating point.
        hold: launch it with the experts' GEMMs only; for a caller that may do without it.
        Raises RuntimeError before ``setup``, TypeError for a wrong dtype, UsageError for a wrong shape or device, for
        more than ``max_tokens`` tokens and, on CPU, for ids out of range. A GPU finds those itself: with ``ep`` None
        their tokens get NaN, with others a later call reports them, and the symmetric memory is of no further use.
        """
        if not self._is_set_up:
            raise RuntimeError("The layer is not set up; call setup() on every rank before the first forward.")
        self._check_weights()
        self._check_input(hidden_states)
        check_routing(hidden_states.shape[0], top_k_index, top_k_weights, self.w13.device, self.top_k)
        if self._exchange is None:
            where = arrange_entries(hidden_states, top_k_index, self.w13)
            return self._dispatch_here(hidden_states, where, top_k_weights)
        ids = to_global_ids(top_k_index, self.num_experts)
        return Pending(
            self._exchange, aligned(hidden_states), aligned(ids), aligned(top_k_weights.float()), self.w13, self.w2,
            self._main_grads(), hold,
        )  # fmt: skip

    def _dispatch_here(self, hidden_states: Tensor, where: Layout, top_k_weights: Tensor) -> LocalPending:
        main_grads = self._main_grads()
        return LocalPending(hidden_states, where, top_k_weights, self.w13, self.w2, main_grads=main_grads)

    def _check_input(self, hidden_states: Tensor) -> None:
        check_hidden_states(hidden_states, self.slot_shape.hidden_size, self.w13)
        if self.ep is not None:
            check_tokens(hidden_states.shape[0], self.slot_shape.max_tokens)

    def _main_grads(self) -> tuple[Tensor | None, Tensor | None] | None:
        """What backward adds the weights' gradients to; None for a frozen weight, or for all."""
        if not self.accumulate_into_main_grad:
            return None
        found: list[Tensor | None] = []
        for name, weight in (("w13", self.w13), ("w2", self.w2)):
            main_grad = getattr(weight, "main_grad", None) if weight.requires_grad else None
            if weight.requires_grad and (main_grad is None or main_grad.shape != weight.shape):
                shape = "missing" if main_grad is None else f"of shape {list(main_grad.shape)}"
                raise UsageError(
                    f"{name}.main_grad is {shape}; assign a buffer of {list(weight.shape)} before forward."
                )
            if main_grad is not None and not (main_grad.is_contiguous() and main_grad.is_floating_point()):
                raise UsageError(f"{name}.main_grad must be contiguous and floating point; it is {main_grad.dtype}.")
            found.append(main_grad)
        return found[0], found[1]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts, [T, H]; the call that transformers makes of its experts."""
        return self.dispatch(hidden_states, top_k_index, top_k_weights).finish()


class FusedMoE(FusedExperts):
    """Router and experts: from hidden states [..., H] to the routed experts' output of the same shape and dtype.

    Arguments, parameters and errors are those of ``FusedExperts`` and, as ``gate``, of ``Router``, whose logits and
    choices ``router.record_routing`` gives to the losses of training.
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
        exchange: ExchangeOptions | None = None,
        accumulate_into_main_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **routing_options: Any,
    ) -> None:
        super().__init__(
            hidden_size, intermediate_size, num_experts, top_k,
            ep=ep, max_tokens=max_tokens, depth=depth, exchange=exchange,
            accumulate_into_main_grad=accumulate_into_main_grad, device=device, dtype=dtype,
        )  # fmt: skip
        self.gate = Router(
            hidden_size, num_experts, top_k, device=self.w13.device, dtype=self.w13.dtype, **routing_options
        )

    def _warm_up(self, exchange: Exchange) -> None:
        super()._warm_up(exchange)
        self.gate.load(self.slot_shape.max_tokens)

    def start(self, hidden_states: Tensor, *, hold: bool = False) -> Pending | LocalPending:
        """Gate, routing and the launch of dispatch of [..., H], of the layer's dtype; returns at once.

        hold: see ``dispatch``, which also says what is raised.
        """
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        self._check_input(flat)
        pending: Pending | LocalPending
        if self._exchange is not None or not self._is_set_up:
            pending = self.dispatch(flat, *self.gate(flat), hold=hold)
        else:
            self._check_weights()
            routing = self.gate.route(flat, tuning.tile_rows(flat.shape[0] * self.top_k, flat, self.w13))
            assert routing.layout is not None
            pending = self._dispatch_here(flat, routing.layout, routing.weights)
        pending.output_shape = hidden_states.shape
        return pending

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """``start``, ``experts`` and ``finish`` in one."""
        return self.start(hidden_states).finish()
