"""Does a stock decoder layer do what FarSkip's layer assumes? Asked before the first layer is changed."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from farskip_fused.conversion import llama4
from farskip_fused.conversion.families import Family
from farskip_fused.conversion.layers import mlp_of, split_mlp
from farskip_fused.errors import UsageError

# The pre-norm skeleton, statement for statement, by the name of the MLP.
STOCK_FORWARDS = {
    "mlp": """
residual = hidden_states
hidden_states = self.input_layernorm(hidden_states)
hidden_states, _ = self.self_attn()
hidden_states = residual + hidden_states
residual = hidden_states
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states = self.mlp(hidden_states)
hidden_states = residual + hidden_states
return hidden_states
""",
    "feed_forward": """
residual = hidden_states
hidden_states = self.input_layernorm(hidden_states)
attention_states, _ = self.self_attn()
hidden_states = residual + attention_states
residual = hidden_states
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states = self.feed_forward(hidden_states)
if self.is_moe_layer:
    hidden_states, _ = hidden_states
hidden_states = residual + hidden_states.view(residual.shape)
return hidden_states
""",
}


def verify_layers(layers: Iterable[nn.Module], family: Family) -> None:
    """UsageError if a layer is not the stock pre-norm layer or its MoE block does not split as its family's does."""
    blocks = []
    for index, layer in enumerate(layers):
        name = type(layer).__name__
        parts = {child for child, _ in layer.named_children()}
        expected = {"input_layernorm", "self_attn", "post_attention_layernorm", family.mlp}
        if parts != expected:
            differing = ", ".join(sorted(parts ^ expected))
            raise UsageError(f"Layer {index} ({name}) is not a stock pre-norm layer: it differs in {differing}.")
        if not _is_of_transformers(layer) or not _has_stock_forward(cast(Any, type(layer)), family.mlp):
            raise UsageError(
                f"Layer {index} ({name}) does not compute what a stock pre-norm layer does;"
                " convert the model as transformers builds it, before any wrapping."
            )
        mlp = mlp_of(layer, family)
        if hasattr(mlp, "experts"):
            blocks.append(mlp)
            _verify_parts_of_block(index, mlp, family)
    if not blocks:
        raise UsageError("The model has no MoE layer, so there is nothing to convert.")
    _verify_split(blocks[0], family)


def _is_of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.")


@functools.cache
def _has_stock_forward(layer_class: Any, mlp: str = "mlp") -> bool:
    try:
        source = textwrap.dedent(inspect.getsource(layer_class.forward))
    except OSError:
        return False
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    for call in ast.walk(function):
        # Every argument is handed to the attention under its own name, as FarSkip's layer does.
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "self.self_attn" and not call.args:
            call.keywords = [keyword for keyword in call.keywords if not _same_name(keyword)]
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return [ast.unparse(line) for line in body] == [ast.unparse(line) for line in ast.parse(STOCK_FORWARDS[mlp]).body]


def _same_name(keyword: ast.keyword) -> bool:
    return isinstance(keyword.value, ast.Name) and keyword.value.id == (keyword.arg or "kwargs")


def _verify_parts_of_block(index: int, block: nn.Module, family: Family) -> None:
    expected = {family.router, "experts", family.shared, family.shared_gate} - {None}
    expected -= {name for name in expected if name and getattr(block, name, block) is None}
    parts = {child for child, _ in block.named_children()}
    if parts != expected:
        differing = ", ".join(sorted(str(part) for part in parts ^ expected))
        raise UsageError(f"The MoE block of layer {index} does not split as {family.model_type}'s: see {differing}.")
    if family.scales_inputs and not llama4.is_stock(block.get_submodule("experts")):
        raise UsageError(
            f"The experts of layer {index} are {type(block.get_submodule('experts')).__name__}, not Llama-4's own;"
            " convert the model before they are replaced or quantised."
        )


@torch.no_grad()
def _verify_split(block: nn.Module, family: Family) -> None:
    """Runs two tokens through the block and through its parts: a release of transformers may change what a block adds.

    Passes over blocks that cannot simply be run here: with experts of somebody else, not materialised, sharded,
    quantised or made random by jitter.
    """
    if not _is_of_transformers(block.get_submodule("experts")):
        return
    parameters = list(block.parameters())
    plain = {torch.float32, torch.bfloat16, torch.float16}
    if any(p.is_meta or type(p) is not nn.Parameter or p.dtype not in plain for p in parameters):
        return
    if len({p.device for p in parameters}) > 1 or (block.training and getattr(block, "jitter_noise", 0) > 0):
        return
    gate = next(block.get_submodule(family.router).parameters())
    hidden_size = gate.shape[-1]
    tokens = torch.linspace(-1, 1, 2 * hidden_size).view(1, 2, hidden_size).to(gate.device, parameters[0].dtype)
    whole = block(tokens)
    if family.scales_inputs:
        whole = whole[0].view(tokens.shape)
    with _enrolled(block, family):
        outputs = [output for output in split_mlp(block, family, tokens) if output is not None]
    # Half-precision sums may round differently; a missing factor or term is far larger.
    if not isinstance(whole, torch.Tensor) or (whole - sum(outputs)).abs().max() > 0.05 * whole.abs().max():
        raise UsageError(
            f"The MoE block of the installed transformers' {family.model_type} is not the sum of its shared and routed"
            " experts; this version of transformers is not supported for it."
        )


@contextmanager
def _enrolled(block: nn.Module, family: Family) -> Iterator[None]:
    """Within it, experts that join the registry when they are converted have joined it, with transformers' own sums."""
    experts = block.get_submodule("experts")
    if family.scales_inputs:
        config = PreTrainedConfig()
        config._experts_implementation = "eager"
        llama4.enrol(experts, config)
    try:
        yield
    finally:
        llama4.dismiss(experts)
