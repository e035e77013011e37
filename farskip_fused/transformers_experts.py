"""The kernels as an experts implementation of transformers, by the name "farskip".

Importing this module registers it, as importing ``farskip_fused.conversion`` does. From then on
``from_pretrained(..., experts_implementation="farskip")`` and ``model.set_experts_implementation("farskip")`` work for
every model whose experts the kernels can compute, in training too.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from farskip_fused.checks import DTYPES
from farskip_fused.errors import UsageError
from farskip_fused.local_experts import fused_experts

try:
    from transformers.integrations import moe
except ModuleNotFoundError as error:
    raise UsageError("This needs transformers; run: pip install 'farskip-fused[hf]'.") from error

NAME = "farskip"

Model = TypeVar("Model", bound=nn.Module)


def use_fused_experts(model: Model) -> Model:
    """Make the experts of a transformers model run on the kernels, in place; returns the model.

    model: stock or converted, of any family whose experts transformers lets one choose; Llama-4's must be converted
        first, ``ff.convert(model, "standard")``. Parameters stay as they are;
        ``model.set_experts_implementation("grouped_mm")`` goes back.
    Raises UsageError, with the model unchanged, for experts that the kernels cannot compute, TypeError if ``model`` is
    no transformers model.
    """
    choose = getattr(model, "set_experts_implementation", None)
    if choose is None:
        raise TypeError(f"A {type(model).__name__} was given; give the transformers model itself.")
    found = [module for module in model.modules() if is_experts(module)]
    if not found:
        raise UsageError(
            f"The {type(model).__name__} has no experts whose implementation can be chosen; Llama-4's must be "
            'converted first: ff.convert(model, "standard").'
        )
    for experts in found:
        check_experts_module(experts)
    choose(NAME)
    for experts in found:
        if cast(Any, experts).config._experts_implementation != NAME:
            raise UsageError(
                f"transformers does not let {type(model).__name__} choose its experts' implementation; give the model "
                "as transformers builds it."
            )
    return model


def is_experts(module: nn.Module) -> bool:
    """Whether transformers asks its registry what this module computes."""
    return all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "is_transposed", "config"))


def check_experts_module(module: nn.Module) -> None:
    """UsageError if the kernels do not compute what the module does, TypeError if they do not know its dtype."""
    experts = cast(Any, module)
    activation = getattr(experts, "act_fn", None)
    reasons = {
        "no gate": not experts.has_gate,
        "interleaved gate and up rows": not experts.is_concatenated,
        "biases": experts.has_bias,
        "a norm after each expert": getattr(experts, "has_post_expert_norm", False),
        "an activation of its own": type(experts)._apply_gate is not moe._default_apply_gate,
        f"the activation {getattr(activation, '__name__', type(activation).__name__)}": not is_silu(activation),
    }
    found = next((reason for reason, applies in reasons.items() if applies), None)
    if found is not None:
        raise UsageError(
            f"{type(experts).__name__} has {found}; the kernels compute SiLU-gated experts without biases."
        )
    dtype = experts.down_proj.dtype
    if dtype not in DTYPES:
        raise TypeError(f"{type(experts).__name__} is {dtype}; the kernels take bfloat16, float16 and float32.")


def is_silu(activation: Any) -> bool:
    """Whether a module or function is SiLU, as torch or transformers writes it."""
    return (
        activation is nn.functional.silu
        or isinstance(activation, nn.SiLU)
        or type(activation).__name__ == "SiLUActivation"
    )


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls instead of the experts' own ``forward``: [N, H] from [N, H], ids and weights [N, K]."""
    check_experts_module(self)
    # Where experts are split, transformers writes the number of local ones for those elsewhere; its older releases do
    # not say whether they are split.
    if getattr(self, "_is_expert_parallel", True):
        top_k_index = torch.where(top_k_index < self.gate_up_proj.shape[0], top_k_index, -1)
    # Under autocast the hidden states may have another dtype than the weights; transformers follows the weights too.
    rows = hidden_states.to(self.gate_up_proj.dtype)
    result = fused_experts(
        rows, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, transposed=self.is_transposed
    )
    return result.to(hidden_states.dtype)


moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
