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
from farskip_fused.conversion.layers import FarSkipLayer
from farskip_fused.errors import UsageError


def verified(decoder: Any) -> list[Anatomy]:
    """The anatomies of the ``layers`` of a decoder, stock or converted.

    Raises UsageError, with the layer and the reason, for one that is no stock pre-norm layer, and if none has experts.
    """
    anatomies = []
    for index, layer in enumerate(decoder.layers):
        if isinstance(layer, FarSkipLayer):
            anatomies.append(layer.anatomy)
            continue
        try:
            anatomies.append(read_layer(layer))
        except ValueError as reason:
            raise UsageError(f"Layer {index} ({type(layer).__name__}) cannot be converted: {reason}.") from None
    if not any(anatomy.block for anatomy in anatomies):
        raise UsageError("The model has no MoE layer, so there is nothing to convert.")
    if not _passes_on_unchanged(type(decoder)):
        raise UsageError(
            f"{type(decoder).__name__} does more between its layers than pass on hidden states; it cannot be converted."
        )
    return anatomies


# What may be done to hidden states between two layers: FarSkip's decoder does it to both streams.
BETWEEN_LAYERS = "self._deepstack_process"


def _passes_on_unchanged(decoder: type) -> bool:
    """Whether the loop over the layers uses what they return as the next layer's first argument only."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(cast(Any, decoder).forward)))
    loops = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For)]
    loops = [loop for loop in loops if "self.layers" in ast.unparse(loop.iter)]
    if len(loops) != 1:
        return False
    permitted: list[ast.expr] = []
    for node in ast.walk(loops[0]):
        if isinstance(node, ast.Assign):
            permitted.append(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("decoder_layer", "layer", BETWEEN_LAYERS):
            permitted += node.args[:1]
    names = [node for node in ast.walk(loops[0]) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    return all(name in permitted for name in names if name.id in ("hidden_states", "layer_outputs"))


class SelfCheck:
    """Runs layers before and after they are converted: with standard connectivity they must be bit-equal to stock.

    The first MoE layer and the first dense one run two random tokens, with a stand-in for the attention that notes
    what it is given. Passes over layers that cannot simply be run here: not materialised, sharded, quantised, or with
    experts of somebody else.
    """

    def __init__(self, layers: Iterable[nn.Module], anatomies: Iterable[Anatomy]) -> None:
        found = {
            anatomy.block is None: (layer, anatomy)
            for layer, anatomy in reversed([*zip(layers, anatomies, strict=True)])
        }
        self.layers = [(*pair, _arguments(pair[0])) for pair in found.values() if _can_run(*pair)]
        self.before = [_run(*layer) for layer in self.layers]

    def passes(self) -> bool:
        """Whether the layers, now with FarSkip's class and standard connectivity, still do the same."""
        return all(
            _same(_run(layer, anatomy, arguments), before, exact=not (anatomy.block and anatomy.block.scales_inputs))
            for (layer, anatomy, arguments), before in zip(self.layers, self.before, strict=True)
        )


def _can_run(layer: nn.Module, anatomy: Anatomy) -> bool:
    plain = {torch.float32, torch.bfloat16, torch.float16}  # transformers has no grouped_mm of double precision
    parameters, tensors = list(layer.parameters()), [*layer.parameters(), *layer.buffers()]
    if any(type(p) is not nn.Parameter or p.dtype not in plain for p in parameters):
        return False
    if any(t.is_meta for t in tensors) or len({t.device for t in tensors}) > 1:
        return False
    experts = getattr(layer.get_submodule(anatomy.mlp), "experts", None)
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


def _same(found: tuple[Tensor, dict[str, Any]], expected: tuple[Tensor, dict[str, Any]], *, exact: bool) -> bool:
    (output, given), (stock_output, stock_given) = found, expected
    if given != stock_given:
        return False
    if exact and output.device.type == "cpu":
        return torch.equal(output, stock_output)
    # On a GPU the rounding of a product may depend on the shape, and Llama-4's experts are added up in another order if
    # a token has several; a missing factor or term is far larger.
    return bool((output - stock_output).abs().max() <= 0.05 * stock_output.abs().max())
