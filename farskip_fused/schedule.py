"""The order of a layer's actions, as data: ``layer.py`` runs it, ``plan`` simulates it, figures draw it.

Free of torch. Source of the FarSkip order: arXiv 2511.11505, section on the training schedule; the attention is split
in two so that the combine of the layer before and the dispatch of this one both have something to hide behind.
"""

from __future__ import annotations

from dataclasses import dataclass

from farskip_fused.connectivity import Connectivity


@dataclass(frozen=True)
class Action:
    """One step of a layer on the compute stream.

    waits_for: transfer that must have arrived first, and of which layer (0 this one, -1 the one before).
    launches: transfer that it leaves behind in flight.
    """

    name: str
    waits_for: tuple[str, int] | None = None
    launches: str | None = None


ATTENTION_PROJECTIONS = Action("attention_projections")
ATTENTION_CORE = Action("attention_core")
FINISH_COMBINE = Action("finish_combine", waits_for=("combine", -1))
START_DISPATCH = Action("start_dispatch", launches="dispatch")
EXPERTS = Action("experts", waits_for=("dispatch", 0), launches="combine")
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
    """The actions of a layer's forward pass, each at the earliest place that its inputs allow."""
    return _FORWARD[connectivity.name]
