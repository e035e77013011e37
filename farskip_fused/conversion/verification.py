"""Does a model do what FarSkip's layers assume? Asked before the first layer is changed, and once more after."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from farskip_fused.connectivity import Streams
from farskip_fused.conversion.anatomy import Anatomy, read_layer
from farskip_fused.conversion.layers import FarSkipLayer, moe_block
from farskip_fused.errors import UsageError


def verified(owner: nn.Module, layers: Iterable[nn.Module]) -> list[Anatomy]:
    """The anatomies of a model's decoder layers, stock or converted.

    owner: the module whose forward runs the layers.
    Raises UsageError, with the layer and the reason, for one that is no stock pre-norm layer, and if none has experts.
    """
    anatomies = []
    for index, layer in enumerate(layers):
        if isinstance(layer, FarSkipLayer):
            anatomies.append(layer.anatomy)
            continue
        try:
            anatomies.append(read_layer(layer))
        except ValueError as reason:
            raise UsageError(f"Layer {index} ({type(layer).__name__}) cannot be converted: {reason}.") from None
    if not any(anatomy.block for anatomy in anatomies):
        raise UsageError("The model has no MoE layer, so there is nothing to convert.")
    if not _passes_on_unchanged(type(owner)):
        raise UsageError(
            f"{type(owner).__name__} does more between its layers than pass on hidden states; it cannot be converted."
        )
    return anatomies


def _passes_on_unchanged(owner: type) -> bool:
    """Whether the loop over the layers uses their outputs for nothing but the next layer's input."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(cast(Any, owner).forward)))
    loops = [
        loop
        for loop in ast.walk(ast.parse(source))
        if isinstance(loop, ast.For) and "self.layers" in ast.unparse(loop.iter)
    ]
    for loop in loops:
        uses = [name for name in ast.walk(loop) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load)]
        uses = [name for name in uses if name.id in ("hidden_states", "layer_outputs")]
        handed_on = [
            value
            for node in ast.walk(loop)
            for value in (
                node.args[:1]
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("decoder_layer", "layer")
                else [node.value]
                if isinstance(node, ast.Assign)
                else []
            )
        ]
        if any(all(use is not value for value in handed_on) for use in uses):
            return False
    return len(loops) == 1


class SelfCheck:
    """Runs layers before and after they are converted: with standard connectivity they must be bit-equal to stock.

    The first MoE layer and the first dense one run two random tokens, with a stand-in for the attention that notes
    what it is given. Passes over layers that cannot simply be run here: not materialised, sharded, quantised, or with
    experts of somebody else.
    """

    def __init__(self, layers: Iterable[nn.Module], anatomies: Iterable[Anatomy]) -> None:
        found = {anatomy.block is None: (layer, anatomy) for layer, anatomy in reversed([*zip(layers, anatomies)])}
        self.layers = [(*pair, _arguments(pair[0])) for pair in found.values() if _can_run(*pair)]
        self.before = [_run(*layer) for layer in self.layers]

    def passes(self) -> bool:
        """Whether the layers, now with FarSkip's class and standard connectivity, still do the same."""
        return all(_same(_run(*layer), before) for layer, before in zip(self.layers, self.before, strict=True))


def _can_run(layer: nn.Module, anatomy: Anatomy) -> bool:
    plain = {torch.float32, torch.bfloat16, torch.float16}  # transformers has no grouped_mm of double precision
    parameters, tensors = list(layer.parameters()), [*layer.parameters(), *layer.buffers()]
    if any(type(p) is not nn.Parameter or p.dtype not in plain for p in parameters):
        return False
    if any(t.is_meta for t in tensors) or len({t.device for t in tensors}) > 1:
        return False
    experts = getattr(moe_block(layer, anatomy), "experts", None)
    return experts is None or type(experts).__module__.startswith("transformers.models.")


def _arguments(stock: nn.Module) -> dict[str, str]:
    """Something for every argument of a stock layer, and one more."""
    named = list(inspect.signature(stock.forward).parameters)[1:]
    return {name: f"<{name}>" for name in named if name != "kwargs"} | {"further": "<further>"}


class _StandIn(nn.Module):
    """Takes the place of the attention: halves its input and keeps what else it was given."""

    def __init__(self, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple
        self.given: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **given: Any) -> Any:
        self.given = given
        output = 0.5 * hidden_states
        return (output, None) if self.in_tuple else output


@torch.no_grad()
def _run(layer: nn.Module, anatomy: Anatomy, arguments: dict[str, str]) -> tuple[Tensor, dict[str, Any]]:
    """Output of a layer in evaluation mode, and what its attention was given besides."""
    name, training = anatomy.attention.module, [module for module in layer.modules() if module.training]
    attention, stand_in = layer.get_submodule(name), _StandIn(anatomy.attention.in_tuple)
    norm = next(layer.get_submodule(anatomy.mlp_norm).parameters())
    tokens = torch.randn(1, 2, norm.shape[-1], generator=torch.Generator().manual_seed(0)).to(norm)
    for module in training:
        module.training = False
    layer._modules[name] = stand_in
    try:
        # Of a converted layer the two streams, of which the first is what a stock layer returns.
        output = layer.forward(Streams(tokens, tokens) if isinstance(layer, FarSkipLayer) else tokens, **arguments)
    finally:
        layer._modules[name] = attention
        for module in training:
            module.training = True
    return (output[0] if isinstance(output, tuple) else output), stand_in.given


def _same(found: tuple[Tensor, dict[str, Any]], expected: tuple[Tensor, dict[str, Any]]) -> bool:
    (output, given), (stock_output, stock_given) = found, expected
    if given != stock_given:
        return False
    if output.device.type == "cpu":
        return torch.equal(output, stock_output)
    # On a GPU the rounding of a product may depend on the shape; a missing factor or term is far larger.
    return bool((output - stock_output).abs().max() <= 0.05 * stock_output.abs().max())
