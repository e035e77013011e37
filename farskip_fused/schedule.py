"""The order of a layer's actions, as data: ``layer.py`` runs it, ``plan`` simulates it, figures draw it.

``layer.py`` runs the forward and backward orders, ``tensor_parallel.py`` those of tensor-parallel inference.
Free of torch. Source of the FarSkip order: arXiv 2511.11505, section on the training schedule; the attention is split
in two so that the combine of the layer before and the dispatch of this one both have something to hide behind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from farskip_fused.connectivity import Connectivity


@dataclass(frozen=True)
class Action:
    """One step of a layer on the compute stream.

    waits_for: transfer that must have arrived first, and of which layer (0 this one, -1 the one before).
    launches: transfer that it leaves behind in flight, and of which layer.
    layer: whose work it is, counted from the layer in whose turn it runs; all but 0 is for depth 2 and more.
    """

    name: str
    waits_for: tuple[str, int] | None = None
    launches: tuple[str, int] | None = None
    layer: int = 0


@dataclass(frozen=True)
class Stream:
    """A stream beside the caller's. priority: CUDA's, the lower goes first. share: of the GPU's multiprocessors that
    its kernels take while the caller's have the rest; put_share: where they put rows instead of storing them."""

    priority: int
    share: float
    put_share: float


# Actions run on the caller's stream, and so does what their GEMMs store at peers as they compute: results and gradients
# on their way back to the tokens. What must be sent by itself is launched here: rows and routing of a dispatch,
# gradients on their way to the experts, sums of rows on their way back. Others wait for it, so it goes first.
# A store is issued and done with; between GPUs of a host, where this was measured, a put is a copy that holds its warp.
COMMUNICATION = Stream(priority=-1, share=8 / 132, put_share=16 / 132)

ATTENTION_PROJECTIONS = Action("attention_projections")
ATTENTION_CORE = Action("attention_core")
FINISH_COMBINE = Action("finish_combine", waits_for=("combine", -1))
START_DISPATCH = Action("start_dispatch", launches=("dispatch", 0))
EXPERTS = Action("experts", waits_for=("dispatch", 0), launches=("combine", 0))
SHARED_EXPERTS = Action("shared_experts")

ACTIONS = (ATTENTION_PROJECTIONS, ATTENTION_CORE, FINISH_COMBINE, START_DISPATCH, EXPERTS, SHARED_EXPERTS)
TRANSFERS = ("dispatch", "combine")

# Shared experts come last everywhere: they need no transfer and hide the start of the combine.
_FORWARD = {
    "farskip": (ATTENTION_PROJECTIONS, FINISH_COMBINE, START_DISPATCH, ATTENTION_CORE, EXPERTS, SHARED_EXPERTS),
    "attention_only": (ATTENTION_PROJECTIONS, ATTENTION_CORE, FINISH_COMBINE, START_DISPATCH, EXPERTS, SHARED_EXPERTS),
    "moe_only": (FINISH_COMBINE, START_DISPATCH, ATTENTION_PROJECTIONS, ATTENTION_CORE, EXPERTS, SHARED_EXPERTS),
    "standard": (FINISH_COMBINE, ATTENTION_PROJECTIONS, ATTENTION_CORE, START_DISPATCH, EXPERTS, SHARED_EXPERTS),
}


def forward_order(connectivity: Connectivity) -> tuple[Action, ...]:
    """The actions of a layer's forward pass, each at the earliest place that its inputs allow.

    From depth 2 on the MoE's input is there before the experts of the layer before have run: they go between dispatch
    and attention, so that a dispatch has the whole layer to arrive in, and a combine that and depth - 2 layers more.
    """
    depth = connectivity.depth
    if depth == 1:
        return _FORWARD[connectivity.name]
    finish_combine = replace(FINISH_COMBINE, waits_for=("combine", -depth))
    experts_before = replace(EXPERTS, layer=-1)
    return (
        finish_combine, START_DISPATCH, experts_before, ATTENTION_PROJECTIONS, ATTENTION_CORE, SHARED_EXPERTS,
    )  # fmt: skip


# What each action becomes in the backward pass. Gradients travel the other way: those of the routed output to the
# experts ("combine_gradients"), those of the experts' input back to the tokens' owners ("dispatch_gradients").
# Weight gradients come after the input gradients, which they hide.
INPUT_GRADIENTS = Action(
    "experts_input_gradients", waits_for=("combine_gradients", 0), launches=("dispatch_gradients", 0)
)
_BACKWARD = {
    "attention_projections": (Action("attention_projections_backward"),),
    "attention_core": (Action("attention_core_backward"),),
    "finish_combine": (Action("start_combine_gradients", launches=("combine_gradients", -1)),),
    "start_dispatch": (Action("finish_dispatch_gradients", waits_for=("dispatch_gradients", 0)),),
    "experts": (INPUT_GRADIENTS, Action("experts_weight_gradients")),
    "shared_experts": (Action("shared_experts_backward"),),
}
BACKWARD_ACTIONS = tuple(action for actions in _BACKWARD.values() for action in actions)
BACKWARD_TRANSFERS = ("combine_gradients", "dispatch_gradients")


def backward_order(connectivity: Connectivity) -> tuple[Action, ...]:
    """The actions of a layer's backward pass: the forward order reversed, so that what a transfer hid behind on its
    way there hides its gradients on their way back. Layers run from the last to the first; offsets still count
    forward (-1 is the layer before, whose backward pass comes next)."""
    order: list[Action] = []
    for action in reversed(forward_order(connectivity)):
        for mirrored in _BACKWARD[action.name]:
            if mirrored.name == "start_combine_gradients":
                mirrored = replace(mirrored, launches=("combine_gradients", -connectivity.depth))
            order.append(replace(mirrored, layer=action.layer))
    return tuple(order)


# Tensor-parallel inference: every rank has all tokens; partial sums are all-reduced instead of rows exchanged. With
# FarSkip the sums of attention and shared experts share one all-reduce, behind the routed experts; that of the routed
# experts goes behind the next attention. ``tensor_parallel.py`` runs these orders.
GATE = Action("gate")
REDUCTIONS = ("attention_reduce", "expert_reduce")
_TENSOR_PARALLEL = {
    "farskip": (
        replace(ATTENTION_PROJECTIONS, waits_for=("attention_reduce", -1)),
        ATTENTION_CORE,
        replace(GATE, waits_for=("expert_reduce", -1)),
        replace(SHARED_EXPERTS, launches=("attention_reduce", 0)),
        Action("experts", launches=("expert_reduce", 0)),
    ),
    "standard": (
        replace(ATTENTION_PROJECTIONS, waits_for=("expert_reduce", -1)),
        replace(ATTENTION_CORE, launches=("attention_reduce", 0)),
        replace(GATE, waits_for=("attention_reduce", 0)),
        Action("experts"),
        replace(SHARED_EXPERTS, launches=("expert_reduce", 0)),
    ),
}
TENSOR_PARALLEL_CONNECTIVITIES = tuple(_TENSOR_PARALLEL)


def tensor_parallel_order(connectivity: Connectivity, next_reads_partial: bool = False) -> tuple[Action, ...]:
    """The actions of a layer in tensor-parallel inference, for the connectivities that ``_TENSOR_PARALLEL`` names.

    next_reads_partial: whether the attention of the next layer reads the stream without this one's routed experts.
    With standard connectivity, whose attention's sum is needed sooner, shared experts then have one of their own.
    """
    order = _TENSOR_PARALLEL[connectivity.name]
    if next_reads_partial and connectivity.name == "standard":
        return *order[:-2], *_TENSOR_PARALLEL["farskip"][-2:]
    return order
