"""The expert layer of one rank, forward and backward, as operators of torch.library.

Three operators, one a step (layout, expert GEMMs, sum), so that a layer can be started, computed and finished like one
whose experts live on several ranks; torch.compile(fullgraph=True) and CUDA graphs take them. Only the sum has a
gradient: its backward is that of the whole layer, a fourth operator. Saved for it are the hidden states, the gate and
up pre-activations, the router weights and the layout: 2 T H + 4 T K I bytes in half precision, and indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from farskip_fused import tuning
from farskip_fused.checks import check_experts, check_hidden_states, check_ids, check_routing
from farskip_fused.kernels import experts, experts_backward, gather_sum, layout
from farskip_fused.kernels.layout import Layout
from farskip_fused.kernels.machine import aligned
from farskip_fused.router import INITIAL_STD, traced_layout


def new_experts(
    count: int, hidden_size: int, intermediate_size: int, device: torch.device | str | None, dtype: torch.dtype
) -> tuple[nn.Parameter, nn.Parameter]:
    """Random w13 [E, 2I, H] and w2 [E, H, I]."""
    w13 = nn.Parameter(torch.empty(count, 2 * intermediate_size, hidden_size, device=device, dtype=dtype))
    w2 = nn.Parameter(torch.empty(count, hidden_size, intermediate_size, device=device, dtype=dtype))
    for weight in (w13, w2):
        nn.init.normal_(weight, std=INITIAL_STD)
    return w13, w2


_LAYOUT = "Tensor order, Tensor places, Tensor offsets, Tensor tiles, Tensor tile_count, int tile_rows"
_INPUTS = "Tensor hidden_states, Tensor top_k_weights, Tensor w13, Tensor w2"
_SAVED = f"{_INPUTS}, Tensor gate_up, {_LAYOUT}, bool transposed"


def fused_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    transposed: bool = False,
) -> Tensor:
    """Weighted sum of each token's SwiGLU experts, all of them on this rank: [T, H], differentiable.

    hidden_states: [T, H] bfloat16, float16 or float32, of any T, also 0.
    top_k_index: [T, K] integers, expert ids from 0 to E - 1, -1 for not routed.
    top_k_weights: [T, K] floating point; the sum is in float32, position 0 first.
    w13: [E, 2I, H], gate rows, then up rows; w2: [E, H, I]; of the hidden states' dtype. With ``transposed`` they are
        [E, H, 2I] and [E, I, H], as Llama-4 and Aria store them, and so are their gradients.
    Raises UsageError or TypeError for tensors that do not fit together and, on CPU, for ids out of range; on a GPU,
    which the host does not wait for, the tokens of such ids get NaN, and so do their gradients.
    """
    check_experts(w13, w2, transposed)
    check_hidden_states(hidden_states, w2.shape[2 if transposed else 1], w13)
    check_routing(hidden_states.shape[0], top_k_index, top_k_weights, w13.device)
    where = arrange_entries(hidden_states, top_k_index, w13)
    return LocalPending(hidden_states, where, top_k_weights, w13, w2, transposed=transposed).finish()


def compute_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, w13: Tensor, w2: Tensor, result: Tensor,
    expert_map: Tensor | None = None,
) -> None:  # fmt: skip
    """``fused_experts`` into ``result`` [T, H], contiguous, for a caller that is an operator itself.

    expert_map: int32, of each id the expert among ``w13``, -1 for one that another rank has and that adds nothing here.
    Trusts its arguments, has no gradient, and calls the kernels without operators in between, whose dispatch takes the
    host a third of the time of all launches.
    """
    ids = aligned(_wide(top_k_index))
    if expert_map is None:
        entries = ids.numel()
        where = _arrange(hidden_states, ids, w13, layout.local_layout)
    else:
        entries = ids.numel() * w13.shape[0] // expert_map.shape[0]  # on average
        where = _sort(hidden_states, ids, w13, partial(layout.local_layout, expert_map=expert_map), entries)
    values, _ = _outputs(hidden_states, w13, w2, where, entries, transposed=False, keep_gate_up=False)
    _sum(values, top_k_weights.float(), where, w13.shape[0], result)


def arrange_entries(hidden_states: Tensor, top_k_index: Tensor, w13: Tensor) -> Layout:
    """The entries of ids [T, K] for the GEMMs of hidden states [T, H] with ``w13``.

    Sorted, or, where that costs less and no backward pass can follow, as they are.
    """
    if torch.is_grad_enabled():
        return sort_entries(hidden_states, top_k_index, w13)
    return _arrange(hidden_states, _wide(top_k_index), w13, _expert_layout)


def sort_entries(hidden_states: Tensor, top_k_index: Tensor, w13: Tensor) -> Layout:
    """The entries of ids [T, K] sorted by expert, for the GEMMs of hidden states [T, H] with ``w13``."""
    return _sort(hidden_states, top_k_index, w13, _expert_layout)


def _arrange(hidden_states: Tensor, ids: Tensor, w13: Tensor, sort: Callable[..., Any]) -> Layout:
    """The entries as they are, where that costs less than ``sort``."""
    tokens, top_k = ids.shape
    if layout.can_stay_unsorted(tokens, top_k, w13.shape[0]):
        return layout.unsorted_layout(ids)
    return _sort(hidden_states, ids, w13, sort)


def _sort(
    hidden_states: Tensor, ids: Tensor, w13: Tensor, sort: Callable[..., Any], entries: int | None = None
) -> Layout:
    """entries: as of ``_outputs``; None for all."""
    tile_rows = tuning.tile_rows(ids.numel() if entries is None else entries, hidden_states, w13)
    order, places, offsets, tiles, tile_count = sort(ids, w13.shape[0], tile_rows)[:5]
    return Layout(order, places, offsets, tiles, tile_count, tile_rows)


class LocalPending:
    """A call in flight on one rank: the steps of ``expert_parallel.Pending`` without peers. Trusts its arguments.

    where: the entries, from ``arrange_entries`` or from the router that chose them.
    main_grads: tensors shaped as ``w13`` and ``w2`` to which backward adds their gradients, instead of returning them.
    """

    def __init__(
        self,
        hidden_states: Tensor,
        where: Layout,
        top_k_weights: Tensor,
        w13: Tensor,
        w2: Tensor,
        *,
        transposed: bool = False,
        main_grads: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.output_shape = hidden_states.shape
        inputs = (hidden_states, top_k_weights.float(), w13, w2)
        self._has_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        # What was started without gradients keeps nothing to compute them from.
        self._inputs = inputs if self._has_gradient else tuple(tensor.detach() for tensor in inputs)
        self._layout, self._transposed = where, transposed
        self._main_grads: Sequence[Tensor | None] = main_grads or (None, None)
        self._result: Tensor | None = None
        self._finished = False

    def experts(self) -> None:
        """Launch the expert GEMMs and their sum, which has nothing to wait for.

        The sum is not left to ``finish``: with activation checkpointing of every layer that one runs in the next layer,
        and so would what it saves for backward.
        """
        if self._result is not None and not is_recomputing():
            raise RuntimeError("experts() was called twice on one pending call; call it once, or only finish().")
        hidden_states, _, w13, w2 = (tensor.detach() for tensor in self._inputs)
        values, gate_up = _expert_outputs(hidden_states, w13, w2, *self._layout, self._transposed, self._has_gradient)
        self._result = _sum_experts(values, *self._inputs, gate_up, *self._layout, self._transposed, *self._main_grads)

    def finish(self, *, shared: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Their weighted sum, shaped as the input; calls ``experts`` if nobody has.

        shared, residual: of the input's shape and dtype, added to it in that order.
        """
        if self._finished:
            raise RuntimeError("finish() was called twice on one pending call; keep its first result.")
        if self._result is None:
            self.experts()
        assert self._result is not None
        self._finished = True
        return add_extras(self._result.reshape(self.output_shape), shared, residual)


def is_recomputing() -> bool:
    """Whether this runs inside a backward pass, as activation checkpointing's recomputation does."""
    return torch._C._current_graph_task_id() != -1


def add_extras(result: Tensor, shared: Tensor | None, residual: Tensor | None) -> Tensor:
    if shared is not None:
        result = result + shared
    return result if residual is None else residual + result


@torch.library.custom_op(
    "farskip_fused::expert_layout",
    mutates_args=(),
    schema="(Tensor top_k_index, SymInt num_experts, int tile_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _expert_layout(top_k_index: Tensor, num_experts: int, tile_rows: int) -> tuple[Tensor, ...]:
    check_ids(top_k_index, num_experts)
    return tuple(layout.local_layout(aligned(_wide(top_k_index)), num_experts, tile_rows)[:5])


_expert_layout.register_fake(traced_layout)


def _wide(ids: Tensor) -> Tensor:
    """In one of the two widths for which kernels are compiled."""
    return ids if ids.dtype in (torch.int32, torch.int64) else ids.to(torch.int32)


@torch.library.custom_op(
    "farskip_fused::expert_outputs",
    mutates_args=(),
    schema=f"(Tensor hidden_states, Tensor w13, Tensor w2, {_LAYOUT}, bool transposed, bool keep_gate_up)"
    " -> (Tensor, Tensor)",
)
def _expert_outputs(hidden_states: Tensor, w13: Tensor, w2: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Outputs of the experts before their sum [C, H], and gate and up pre-activations [C, 2I], or [0, 2I]."""
    *parts, transposed, keep_gate_up = rest
    where = Layout(*parts)
    if not where.is_sorted:
        check_ids(where.places, w13.shape[0])
        where = layout.unsorted_layout(aligned(where.places))
    values, gate_up = _outputs(hidden_states, w13, w2, where, where.places.numel(), transposed, keep_gate_up)
    return values, values.new_empty(0, w13.shape[2 if transposed else 1]) if gate_up is None else gate_up


def _outputs(
    hidden_states: Tensor, w13: Tensor, w2: Tensor, where: Layout, entries: int, transposed: bool, keep_gate_up: bool
) -> tuple[Tensor, Tensor | None]:
    """entries: how many the block sizes of ``where`` were chosen for."""
    rows, w13, w2 = aligned(hidden_states), aligned(w13), aligned(w2)
    choice = tuning.choose(entries, rows, w13)
    gate_up, activated = experts.up_swiglu(rows, where, where.places.shape[1], w13, keep_gate_up, transposed, choice)
    return experts.project(activated, where, w2, 2 if transposed else 1, choice), gate_up


@_expert_outputs.register_fake
def _(hidden_states: Tensor, w13: Tensor, w2: Tensor, order: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, transposed, keep_gate_up = rest
    capacity = order.shape[0]
    values = hidden_states.new_empty(capacity, hidden_states.shape[1])
    return values, hidden_states.new_empty(capacity if keep_gate_up else 0, w13.shape[2 if transposed else 1])


@torch.library.custom_op(
    "farskip_fused::sum_experts",
    mutates_args=(),
    schema=f"(Tensor values, {_SAVED}, Tensor? w13_main_grad, Tensor? w2_main_grad) -> Tensor",
)
def _sum_experts(values: Tensor, hidden_states: Tensor, top_k_weights: Tensor, w13: Tensor, *rest: Any) -> Tensor:
    _, _, *parts, _, _, _ = rest
    return _sum(values, top_k_weights, Layout(*parts), w13.shape[0], None)


def _sum(values: Tensor, top_k_weights: Tensor, where: Layout, num_experts: int, result: Tensor | None) -> Tensor:
    unsorted_experts = 0 if where.is_sorted else num_experts
    places, weights = aligned(where.places), aligned(top_k_weights)
    return gather_sum.sum_entries(values, places, weights, unsorted_experts, result)


@_sum_experts.register_fake
def _(values: Tensor, hidden_states: Tensor, *_: Any) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *saved, ctx.tile_rows, ctx.transposed, w13_main_grad, w2_main_grad = inputs
    ctx.save_for_backward(*saved)
    # Not saved by autograd: another micro-batch may add to them before this one's backward.
    ctx.main_grads = (w13_main_grad, w2_main_grad)


def _differentiate(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[1:5]
    arguments = (output_gradient, *ctx.saved_tensors, ctx.tile_rows, ctx.transposed, needed)
    if ctx.main_grads == (None, None):
        results = _expert_gradients(*arguments)
    else:
        results = (*_expert_gradients_into(*arguments, *ctx.main_grads), None, None)
    gradients = [result if wanted else None for result, wanted in zip(results, needed, strict=True)]
    return None, *gradients, *[None] * 10


_sum_experts.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op(
    "farskip_fused::expert_gradients",
    mutates_args=(),
    schema=f"(Tensor output_gradient, {_SAVED}, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _expert_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """Of hidden states, router weights, w13 and w2; an empty tensor where it is not needed."""
    return tuple(_gradients(*arguments, (None, None)))


@_expert_gradients.register_fake
def _(
    output_gradient: Tensor, hidden_states: Tensor, top_k_weights: Tensor, w13: Tensor, w2: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    inputs = (hidden_states, top_k_weights, w13, w2)
    return tuple(
        tensor.new_empty(tensor.shape if wanted else [0]) for tensor, wanted in zip(inputs, rest[-1], strict=True)
    )


@torch.library.custom_op(
    "farskip_fused::expert_gradients_into",
    mutates_args=("w13_main_grad", "w2_main_grad"),
    schema=f"(Tensor output_gradient, {_SAVED}, bool[] needed, Tensor(a!)? w13_main_grad, Tensor(b!)? w2_main_grad)"
    " -> (Tensor, Tensor)",
)
def _expert_gradients_into(*arguments: Any) -> tuple[Tensor, ...]:
    """Of hidden states and router weights; those of w13 and w2 are added to their main gradients."""
    *rest, w13_main_grad, w2_main_grad = arguments
    return tuple(_gradients(*rest, (w13_main_grad, w2_main_grad))[:2])


@_expert_gradients_into.register_fake
def _(output_gradient: Tensor, hidden_states: Tensor, top_k_weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needed = rest[-3]
    inputs = (hidden_states, top_k_weights)
    return tuple(
        tensor.new_empty(tensor.shape if wanted else [0]) for tensor, wanted in zip(inputs, needed[:2], strict=True)
    )


def _gradients(
    output_gradient: Tensor, hidden_states: Tensor, top_k_weights: Tensor, w13: Tensor, w2: Tensor, gate_up: Tensor,
    *rest: Any,
) -> list[Tensor]:  # fmt: skip
    *parts, transposed, needed, main_grads = rest
    where = Layout(*parts)
    top_k = top_k_weights.shape[1]
    output_gradient, rows, weights = aligned(output_gradient), aligned(hidden_states), aligned(top_k_weights)
    gate_up_gradient, weighted_activation, weight_parts = experts_backward.down_gradient_swiglu(
        output_gradient, weights, where, aligned(w2), gate_up, transposed
    )
    results = [tensor.new_empty(0) for tensor in (hidden_states, weights, w13, w2)]
    if needed[0]:
        row_gradients = experts.project(gate_up_gradient, where, aligned(w13), 1 if transposed else 2)
        results[0] = gather_sum.sum_entries(row_gradients, where.places, None)
    if needed[1]:
        results[1] = gather_sum.sum_parts(weight_parts, where.places)
    # Each is a sum of outer products; transposed, its factors change sides.
    sides = ((gate_up_gradient, rows, False), (output_gradient, weighted_activation, True))
    for index, (left, right, gather_left) in enumerate(sides):
        if needed[2 + index]:
            if transposed:
                left, right, gather_left = right, left, not gather_left
            results[2 + index] = experts_backward.weight_gradient(
                left, right, where, top_k, gather_left, main_grads[index]
            )
    return results
