"""FarSkip-Collective at kernel level: expert-parallel MoE layers whose communication is hidden.

Everything public is here; modules load when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farskip_fused.all_reduce import AllReduce
    from farskip_fused.connectivity import Connectivity
    from farskip_fused.conversion import convert, load, parallelize, revert
    from farskip_fused.distillation import distill
    from farskip_fused.errors import PeerTimeout, UsageError
    from farskip_fused.exchange_setup import ExchangeOptions
    from farskip_fused.layer import Carry, OverlappedLayer
    from farskip_fused.local_experts import fused_experts
    from farskip_fused.moe import FusedExperts, FusedMoE
    from farskip_fused.symmetric import SymmetricMemory, init
    from farskip_fused.tensor_parallel import SplitMLP, SplitMoE, TensorParallelLayer
    from farskip_fused.token_exchange import TokenExchange, combine_send, combine_wait, dispatch_send, dispatch_wait
    from farskip_fused.transformers_experts import use_fused_experts

_NAMES = {
    "all_reduce": ("AllReduce",),
    "connectivity": ("Connectivity",),
    "conversion": ("convert", "load", "parallelize", "revert"),
    "distillation": ("distill",),
    "errors": ("PeerTimeout", "UsageError"),
    "exchange_setup": ("ExchangeOptions",),
    "layer": ("Carry", "OverlappedLayer"),
    "local_experts": ("fused_experts",),
    "moe": ("FusedExperts", "FusedMoE"),
    "symmetric": ("SymmetricMemory", "init"),
    "tensor_parallel": ("SplitMLP", "SplitMoE", "TensorParallelLayer"),
    "token_exchange": ("TokenExchange", "combine_send", "combine_wait", "dispatch_send", "dispatch_wait"),
    "transformers_experts": ("use_fused_experts",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "AllReduce",
    "Carry",
    "Connectivity",
    "ExchangeOptions",
    "FusedExperts",
    "FusedMoE",
    "OverlappedLayer",
    "PeerTimeout",
    "SplitMLP",
    "SplitMoE",
    "SymmetricMemory",
    "TensorParallelLayer",
    "TokenExchange",
    "UsageError",
    "__version__",
    "combine_send",
    "combine_wait",
    "convert",
    "dispatch_send",
    "dispatch_wait",
    "distill",
    "fused_experts",
    "init",
    "load",
    "parallelize",
    "revert",
    "use_fused_experts",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("farskip-fused")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
