"""The router: which experts each token goes to, with what weights; open to the losses of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from farskip_fused.errors import UsageError
from farskip_fused.kernels import routing
from farskip_fused.kernels.layout import Layout, can_stay_unsorted, unsorted_layout
from farskip_fused.kernels.machine import INTERPRETED, aligned

INITIAL_STD = 0.02


class Routing(NamedTuple):
    """What a router decided: ids [T, K] int32 by falling choice, weights [T, K] float32, logits [T, E] float32.

    Weights and logits are differentiable. layout: the entries for the GEMMs, where it was asked for.
    """

    ids: Tensor
    weights: Tensor
    logits: Tensor
    layout: Layout | None


class Router(nn.Module):
    """Scores every expert for every token and chooses ``top_k``, in float32.

    scoring: "softmax" or "sigmoid". normalize_top_k: divide the chosen scores by their sum. routed_scaling: factor on
    the weights. num_groups, top_k_groups: choose only among the experts of the best groups (DeepSeek).
    correction_bias: a buffer ``e_score_correction_bias`` [E] added to the scores for the choice alone;
    ``router_losses.update_correction_bias`` moves it.
    Parameter: weight [E, H]. Must be the same on every rank.
    Raises UsageError for another scoring, and for groups that the experts or ``top_k`` do not fit into.
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
        self.top_k, self.scoring, self.normalize_top_k = top_k, scoring, normalize_top_k
        self.routed_scaling, self.num_groups, self.top_k_groups = float(routed_scaling), num_groups, top_k_groups
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=INITIAL_STD)
        bias = torch.zeros(num_experts, device=device) if correction_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self._record: list[tuple[str, Routing]] | None = None
        self._record_name = ""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """From [T, H] to expert ids [T, K] int32 and weights [T, K] float32."""
        result = self.route(hidden_states)
        return result.ids, result.weights

    def route(self, hidden_states: Tensor, tile_rows: int = 0) -> Routing:
        """From [T, H], of any floating dtype, to the whole ``Routing``.

        tile_rows: rows of a tile of the expert GEMMs that follow; 0 for no layout.
        Raises UsageError for another shape.
        """
        if hidden_states.dim() != 2 or hidden_states.shape[1] != self.weight.shape[1]:
            raise UsageError(
                f"Hidden states {list(hidden_states.shape)} were given; [tokens, {self.weight.shape[1]}] is needed."
            )
        unsorted = not torch.is_grad_enabled() and can_stay_unsorted(len(hidden_states), self.top_k, len(self.weight))
        ids, weights, logits, order, places, offsets, tiles, tile_count = _route(
            hidden_states, self.weight, self.e_score_correction_bias, self.top_k, self.scoring == "sigmoid",
            self.normalize_top_k, self.routed_scaling, self.num_groups, self.top_k_groups, 0 if unsorted else tile_rows,
        )  # fmt: skip
        layout = Layout(order, places, offsets, tiles, tile_count, tile_rows) if tile_rows else None
        if unsorted and tile_rows:
            layout = unsorted_layout(ids)
        result = Routing(ids, weights, logits, layout)
        # Activation checkpointing calls a router again, in its backward pass, for what is recorded already.
        if self._record is not None and torch._C._current_graph_task_id() == -1:
            self._record.append((self._record_name, result))
        return result

    def load(self, max_tokens: int) -> None:
        """Load every kernel that ``forward`` and its backward launch for up to ``max_tokens`` tokens.

        Kernels differ by the number of tokens rounded up to a power of two, and loading one while another waits for a
        peer deadlocks.
        """
        powers = range(0 if INTERPRETED else (max_tokens - 1).bit_length())
        counts = {1 if INTERPRETED else max_tokens, *(2**power for power in powers)}
        weight = self.weight.detach()
        for tokens in sorted(counts):
            with torch.enable_grad():
                x = weight.new_zeros(tokens, weight.shape[1]).requires_grad_()
                torch.autograd.grad(self.route(x).weights.sum(), x)


@contextmanager
def record_routing(module: nn.Module) -> Iterator[list[tuple[str, Routing]]]:
    """Within it, every call of a ``Router`` in ``module`` adds its name and ``Routing`` to the list that this yields.

    Their logits carry gradients, for auxiliary losses (``router_losses``). The routers keep nothing of it.
    Raises UsageError if ``module`` has no router, or one that is being recorded already.
    """
    routers = [(name, child) for name, child in module.named_modules() if isinstance(child, Router)]
    if not routers:
        raise UsageError(f"The {type(module).__name__} has no farskip_fused Router whose routing could be recorded.")
    if any(router._record is not None for _, router in routers):
        raise UsageError("The routing of this module is being recorded already; use that record.")
    record: list[tuple[str, Routing]] = []
    for name, router in routers:
        router._record, router._record_name = record, name
    try:
        yield record
    finally:
        for _, router in routers:
            router._record = None


@torch.library.custom_op(
    "farskip_fused::route",
    mutates_args=(),
    schema="(Tensor hidden_states, Tensor weight, Tensor? bias, int top_k, bool sigmoid, bool normalise, float scaling,"
    " int groups, int top_groups, int tile_rows)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _route(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, sigmoid: bool, normalise: bool,
    scaling: float, groups: int, top_groups: int, tile_rows: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Ids, weights, logits, and the tensors of the layout: empty ones for ``tile_rows`` 0."""
    ids, weights, logits, layout = routing.route(
        aligned(hidden_states), aligned(weight), top_k, sigmoid=sigmoid, normalise=normalise, scaling=scaling,
        groups=groups, top_groups=top_groups, bias=None if bias is None else aligned(bias), tile_rows=tile_rows,
    )  # fmt: skip
    if layout is None:
        return ids, weights, logits, *(ids.new_empty(0) for _ in range(5))
    return ids, weights, logits, *layout[:5]


@_route.register_fake
def _(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, sigmoid: bool, normalise: bool,
    scaling: float, groups: int, top_groups: int, tile_rows: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    tokens, num_experts = hidden_states.shape[0], weight.shape[0]
    ids = hidden_states.new_empty(tokens, top_k, dtype=torch.int32)
    floats = (ids.new_empty(shape, dtype=torch.float32) for shape in ([tokens, top_k], [tokens, num_experts]))
    if not tile_rows:
        return ids, *floats, *(ids.new_empty(0) for _ in range(5))
    return ids, *floats, *traced_layout(ids, num_experts, tile_rows)


def traced_layout(ids: Tensor, num_experts: int, tile_rows: int) -> tuple[Tensor, ...]:
    """Tensors of the shapes that the sorted layout of ids [T, K] has, for operators that are traced, not run."""
    entries = ids.numel()
    row_tiles = torch.sym_max(entries // tile_rows + torch.sym_min(num_experts, entries), 1)
    shapes = ([entries], list(ids.shape), [num_experts + 1], [row_tiles, 4], [1])
    return tuple(ids.new_empty(shape, dtype=torch.int32) for shape in shapes)


@torch.library.custom_op(
    "farskip_fused::route_gradient",
    mutates_args=(),
    schema="(Tensor logits, Tensor ids, Tensor weights_gradient, bool sigmoid, bool normalise, float scaling)"
    " -> Tensor",
)
def _route_gradient(
    logits: Tensor, ids: Tensor, weights_gradient: Tensor, sigmoid: bool, normalise: bool, scaling: float
) -> Tensor:
    """Of the logits, from that of the weights."""
    return routing.route_backward(logits, ids, weights_gradient, sigmoid=sigmoid, normalise=normalise, scaling=scaling)


@_route_gradient.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, weight, _, _, sigmoid, normalise, scaling, *_ = inputs
    ids, _, logits, *_ = output
    ctx.save_for_backward(hidden_states, weight, ids, logits)
    ctx.options = (sigmoid, normalise, scaling)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, _: Any, weights_gradient: Tensor | None, gradient: Tensor | None, *__: Any) -> Any:
    hidden_states, weight, ids, logits = ctx.saved_tensors
    if weights_gradient is not None:
        through_weights = _route_gradient(logits, ids, weights_gradient, *ctx.options)
        gradient = through_weights if gradient is None else gradient + through_weights
    hidden_gradient, weight_gradient = None, None
    if gradient is not None:
        with torch.autocast(hidden_states.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                hidden_gradient = (gradient @ weight.float()).to(hidden_states.dtype)
            if ctx.needs_input_grad[1]:
                weight_gradient = (gradient.T @ hidden_states.float()).to(weight.dtype)
    return hidden_gradient, weight_gradient, *[None] * 8


_route.register_autograd(_differentiate, setup_context=_save)
