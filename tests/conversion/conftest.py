"""Tiny random models of every family, and FarSkip as the paper writes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conversion import tiny_models

# One of each kind of layer and block: these run in every test session, all the others under the mark "full".
TYPICAL = [
    "deepseek_v3",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "granitemoeshared",
    "qwen3_next",
    "laguna",
    "llama4_text",
]


def families(fast: list[str] = TYPICAL, without: Collection[str] = ()) -> list[Any]:
    """All families but some as parameters of a test, those that are not ``fast`` under the mark "full"."""
    chosen = [name for name in tiny_models.ALL if name not in without]
    return [name if name in fast else pytest.param(name, marks=pytest.mark.full) for name in chosen]


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """``tiny(model_type, dtype=torch.float64, **config)``: a stock model in eval mode, the same one at every call."""
    return tiny_models.build


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    return torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def paper() -> Callable[..., tuple[Tensor, list[Tensor]]]:
    """``paper(stock, tokens, attention, mlp)``: logits and o_0 .. o_L-1 by the equations of the paper.

    attention, mlp: the layers whose attention reads the partial input and whose MLP reads the outdated one. Works on
    the unconverted modules and keeps o, attention and shared outputs of every layer by name; nothing of the package.
    """

    def run(stock: Any, tokens: Tensor, attention: set[int], mlp: set[int]) -> tuple[Tensor, list[Tensor]]:
        layers = layers_of(stock)
        embedding, arguments = what_layers_receive(stock, tokens)
        o: dict[int, Tensor] = {-2: embedding, -1: embedding}
        attended: dict[int, Tensor] = {}
        shared: dict[int, Tensor] = {}
        for k, layer in enumerate(layers):
            scale = getattr(layer, "residual_multiplier", 1)  # Granite's, of all that is added
            attention_input = o[k - 1]
            if k in attention and k - 1 in shared:
                attention_input = (o[k - 2] + attended[k - 1] * scale) + shared[k - 1] * scale
            attended[k] = _first(mixer_of(layer)(hidden_states=layer.input_layernorm(attention_input), **arguments[k]))
            norm = layer.pre_ff_layernorm if hasattr(layer, "pre_ff_layernorm") else layer.post_attention_layernorm
            mlp_input = norm(o[k - 1] if k in mlp else o[k - 1] + attended[k] * scale)
            o[k] = (o[k - 1] + attended[k] * scale) + _mlp(layer, mlp_of(layer), mlp_input) * scale
            if hasattr(mlp_of(layer), "experts"):
                shared[k] = _mlp(layer, _without_routed_experts(mlp_of(layer)), mlp_input)
        states = [o[k] for k in range(len(layers))]
        return logits_after(stock, tokens, states[-1]), states

    return run


def layers_of(model: Any) -> Any:
    """The decoder layers of a stock or converted model, found by their experts."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return next(layers for layers in lists if any(hasattr(mlp_of(layer), "experts") for layer in layers))


def mlp_of(layer: Any) -> Any:
    return next((getattr(layer, n) for n in ("mlp", "feed_forward", "block_sparse_moe") if hasattr(layer, n)), None)


def mixer_of(layer: Any) -> Any:
    """The attention, or what stands in its place."""
    return next(p for n in ("self_attn", "linear_attn", "mamba") if (p := getattr(layer, n, None)) is not None)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _mlp(layer: Any, block: Any, hidden_states: Tensor) -> Tensor:
    """Llama-4's blocks return their flattened output with the router's logits; Granite's shared experts are beside."""
    output = _first(block(hidden_states)).view(hidden_states.shape)
    shared = getattr(layer, "shared_mlp", None)
    return output if shared is None else output + shared(hidden_states)


def what_layers_receive(stock: Any, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """What goes into the first layer, and what each layer hands to its attention beside hidden states."""
    embedding: list[Tensor] = []
    seen: list[dict[str, Any]] = []

    def note(_module: Any, _arguments: Any, kwargs: dict[str, Any]) -> None:
        seen.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

    layers = layers_of(stock)
    hooks = [layers[0].register_forward_pre_hook(lambda _, arguments: embedding.append(arguments[0]))]
    hooks += [mixer_of(layer).register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    stock(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return embedding[0], seen


def logits_after(stock: Any, tokens: Tensor, last: Tensor) -> Tensor:
    """What the model makes of the output of its last layer."""
    hook = layers_of(stock)[-1].register_forward_hook(lambda *_: last)
    logits = stock(tokens, use_cache=False).logits
    hook.remove()
    return logits


def _without_routed_experts(block: Any) -> Any:
    silent = copy.deepcopy(block)
    for name, parameter in silent.experts.named_parameters():
        if name.startswith("down_proj"):
            torch.nn.init.zeros_(parameter)
    return silent
