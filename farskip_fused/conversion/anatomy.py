"""How a stock decoder layer is built, read from the source of its class; what is built otherwise is refused.

transformers writes its pre-norm layers alike: norm, attention, add, norm, MLP, add, in a ``forward`` whose statements
are the same but for a few words. So no list of families is needed. The attention half must be a norm, one call (or a
choice between two by the kind of layer) and one addition; the MLP half must be one of ``MLP_HALVES``. The block behind
the MLP's name must use no part that is unknown here.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from farskip_fused.conversion import llama4

MULTIPLIER = "residual_multiplier"


@dataclass(frozen=True)
class AttentionCall:
    """How the layer calls its attention, or what stands in its place.

    module: its name in the layer. renamed: arguments of the layer that it takes under another name. withheld: those
    that it does not get. takes_rest: whether it gets what the layer does not name. in_tuple: whether the output is the
    first of several.
    """

    module: str
    renamed: tuple[tuple[str, str], ...]
    withheld: frozenset[str]
    takes_rest: bool
    named: frozenset[str]
    in_tuple: bool

    def __call__(self, layer: nn.Module, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        kept = {
            name: value
            for name, value in arguments.items()
            if name not in self.withheld and (self.takes_rest or name in self.named)
        }
        kept |= {there: arguments[here] for here, there in self.renamed if here in arguments}
        output = layer.get_submodule(self.module)(hidden_states=hidden_states, **kept)
        return cast(Tensor, output[0] if self.in_tuple else output)


@dataclass(frozen=True)
class Block:
    """The parts of an MoE block, by their names in it; None for a part that its family does not have.

    shared_gate: a linear map whose sigmoid scales the shared experts' output. jitter: the attribute that says by how
    much the input is disturbed in training. takes_bias: whether the router is given the block's correction bias.
    scales_routed: whether ``routed_scaling_factor`` scales the experts' output here (and not in the router).
    scales_inputs: whether the router's scores multiply the input of the experts, as only Llama-4's do.
    """

    router: str
    shared: str | None
    shared_gate: str | None
    jitter: str | None
    takes_bias: bool
    scales_routed: bool
    scales_inputs: bool


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder layer, and how they are used.

    mlp: the name of its MLP or MoE block. mlp_norm: of the norm before that. shared: of shared experts beside the block
    instead of in it. multiplied: whether ``residual_multiplier`` scales all that is added. block: the parts of the MoE
    block, None in a dense layer.
    """

    attention: AttentionCall
    mlp_norm: str
    mlp: str
    shared: str | None
    multiplied: bool
    block: Block | None

    def attend(self, layer: nn.Module, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Norm and attention of [batch, sequence, hidden]; arguments: those of the stock layer."""
        return self.attention(layer, cast(Any, layer).input_layernorm(hidden_states), arguments)

    def split_mlp(self, layer: nn.Module, hidden_states: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Norm, then shared and routed output of [batch, sequence, hidden]; ``(output, None)`` of a dense layer."""
        hidden_states = getattr(layer, self.mlp_norm)(hidden_states)
        mlp = getattr(layer, self.mlp)
        if self.block is None:
            return mlp(hidden_states), None
        shared, routed = split_block(mlp, self.block, hidden_states)
        beside = getattr(layer, self.shared) if self.shared else None
        return (shared if beside is None else beside(hidden_states)), routed

    def multiplier(self, layer: nn.Module) -> float:
        return getattr(layer, MULTIPLIER) if self.multiplied else 1.0


def split_block(mlp: nn.Module, parts: Block, hidden_states: Tensor) -> tuple[Tensor | None, Tensor]:
    """Shared and routed output of an MoE block for [batch, sequence, hidden]; both have its shape.

    Whatever module sits at ``experts`` is called as ``experts(hidden [N, H], indices [N, K], weights [N, K]) ->
    [N, H]``, for Llama-4 with scaled hidden states, a row for each expert of a token, and weights of one.
    """
    block = cast(Any, mlp)
    jitter = getattr(block, parts.jitter) if parts.jitter and block.training else 0
    if jitter > 0:
        hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(1.0 - jitter, 1.0 + jitter)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    router = getattr(block, parts.router)
    if parts.scales_inputs:
        routed = llama4.split_block(block, flat)
    else:
        _, weights, indices = router(flat, block.e_score_correction_bias) if parts.takes_bias else router(flat)
        routed = block.experts(flat, indices, weights)
    routed = routed.view(hidden_states.shape)
    if parts.scales_routed:
        routed = routed * block.routed_scaling_factor
    shared_experts = getattr(block, parts.shared) if parts.shared else None
    if shared_experts is None:
        return None, routed
    shared = shared_experts(hidden_states)
    if parts.shared_gate:
        shared = torch.sigmoid(getattr(block, parts.shared_gate)(hidden_states)) * shared
    return shared, routed


def read_layer(layer: nn.Module) -> Anatomy:
    """The anatomy of a stock decoder layer; ValueError, with the reason, for one that is built otherwise.

    Reads the source of the layer's class, and which parts this layer has of those that its class may have.
    """
    function, body = _forward(cast(type, type(layer)))
    ends = [i for i, line in enumerate(body) if ast.unparse(line) == "residual = hidden_states"]
    if len(ends) != 2 or ends[0] != 0:
        raise ValueError("it does not compute what a stock pre-norm layer does")
    attention, attention_multiplied = _read_attention_half(layer, function, body[1 : ends[1]])
    text = "\n".join(ast.unparse(line) for line in body[ends[1] + 1 :])
    found = next((half for half in MLP_HALVES if half.text == text), None)
    if found is None or attention_multiplied != found.multiplied:
        raise ValueError("it does not compute what a stock pre-norm layer does")
    # In some families the block is missing from layers without experts, and what stands beside it is all there is.
    mlp = found.mlp if hasattr(layer, found.mlp) else cast(str, found.shared)
    shared = found.shared if found.shared != mlp and getattr(layer, found.shared or "", None) is not None else None
    expected = {"input_layernorm", attention.module, found.norm, mlp} | ({shared} if shared else set())
    parts = {name for name, _ in layer.named_children()}
    if parts != expected:
        raise ValueError(f"it differs in {', '.join(sorted(parts ^ expected))}")
    block = layer.get_submodule(mlp)
    return Anatomy(attention, found.norm, mlp, shared, found.multiplied, read_block(block) if is_moe(block) else None)


def is_moe(block: nn.Module) -> bool:
    return hasattr(block, "experts")


def read_block(block: nn.Module) -> Block:
    """The parts of a stock MoE block; ValueError, with the reason, for one that does not split as known."""
    names = _names_in_forward(cast(type, type(block)))
    router = next((name for name in ("gate", "router") if name in names), None)
    if router is None:
        raise ValueError("its block has no router that is known here")
    shared = next((name for name in ("shared_experts", "shared_expert", "shared_mlp") if name in names), None)
    shared_gate = "shared_expert_gate" if "shared_expert_gate" in names else None
    jitter = next((name for name in ("jitter_noise", "input_jitter_noise") if name in names), None)
    expected = {router, "experts"} | {name for name in (shared, shared_gate) if name and getattr(block, name, None)}
    found = {name for name, _ in block.named_children()}
    unknown = (found ^ expected) | (names - expected - {shared, shared_gate, jitter} - _KNOWN_IN_BLOCKS)
    if unknown:
        raise ValueError(f"its block does not split into routed and shared experts: see {', '.join(sorted(unknown))}")
    if getattr(block, "enable_moe_fp32_combine", False):
        raise ValueError("its block adds up routed and shared experts in float32; set enable_moe_fp32_combine to False")
    takes_bias, scales_routed = "e_score_correction_bias" in names, "routed_scaling_factor" in names
    scales_inputs = _scales_inputs(block)
    return Block(router, shared, shared_gate, jitter, takes_bias, scales_routed, scales_inputs)


def _scales_inputs(block: nn.Module) -> bool:
    if type(block).__name__ != llama4.STOCK_BLOCK:
        return False
    experts = block.get_submodule("experts")
    if not llama4.is_stock(experts):
        raise ValueError(
            f"its experts are {type(experts).__name__}, not Llama-4's own; convert before they are changed"
        )
    return True


# What a block's forward may use besides its parts.
_KNOWN_IN_BLOCKS = {
    "e_score_correction_bias",
    "enable_moe_fp32_combine",
    "hidden_dim",
    "input_size",
    "routed_scaling_factor",
    "training",
}


@dataclass(frozen=True)
class _MlpHalf:
    """The second half of a layer's forward, as transformers writes it, and the names in it."""

    text: str
    mlp: str = "mlp"
    norm: str = "post_attention_layernorm"
    shared: str | None = None
    multiplied: bool = False


MLP_HALVES = [
    _MlpHalf(
        """\
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states = self.mlp(hidden_states)
hidden_states = residual + hidden_states
return hidden_states"""
    ),
    _MlpHalf(  # gpt_oss
        """\
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states, _ = self.mlp(hidden_states)
hidden_states = residual + hidden_states
return hidden_states"""
    ),
    _MlpHalf(  # qwen3_next, qwen3_5_moe
        """\
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states = self.mlp(hidden_states)
if isinstance(hidden_states, tuple):
    hidden_states, _ = hidden_states
hidden_states = residual + hidden_states
return hidden_states"""
    ),
    _MlpHalf(  # llama4
        """\
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states = self.feed_forward(hidden_states)
if self.is_moe_layer:
    hidden_states, _ = hidden_states
hidden_states = residual + hidden_states.view(residual.shape)
return hidden_states""",
        mlp="feed_forward",
    ),
    _MlpHalf(  # jamba
        """\
hidden_states = self.pre_ff_layernorm(hidden_states)
hidden_states = self.feed_forward(hidden_states)
hidden_states = residual + hidden_states
return hidden_states""",
        mlp="feed_forward",
        norm="pre_ff_layernorm",
    ),
    _MlpHalf(
        """\
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states = self.block_sparse_moe(hidden_states)
hidden_states = residual + hidden_states * self.residual_multiplier
return hidden_states""",
        mlp="block_sparse_moe",
        multiplied=True,
    ),
    _MlpHalf(
        """\
hidden_states = self.post_attention_layernorm(hidden_states)
moe_hidden_states = self.block_sparse_moe(hidden_states)
if self.shared_mlp is None:
    hidden_states = moe_hidden_states
else:
    hidden_states = moe_hidden_states + self.shared_mlp(hidden_states)
hidden_states = residual + hidden_states * self.residual_multiplier
return hidden_states""",
        mlp="block_sparse_moe",
        shared="shared_mlp",
        multiplied=True,
    ),
    _MlpHalf(
        """\
hidden_states = self.post_attention_layernorm(hidden_states)
if self.has_experts:
    moe_hidden_states = self.block_sparse_moe(hidden_states)
    hidden_states = moe_hidden_states + self.shared_mlp(hidden_states)
else:
    hidden_states = self.shared_mlp(hidden_states)
hidden_states = residual + hidden_states * self.residual_multiplier
return hidden_states""",
        mlp="block_sparse_moe",
        shared="shared_mlp",
        multiplied=True,
    ),
]


@functools.cache
def _forward(stock: type) -> tuple[ast.FunctionDef, list[ast.stmt]]:
    """The forward method of a class of transformers, and its statements without the docstring."""
    try:
        if not stock.__module__.startswith("transformers.models."):
            raise OSError
        source = textwrap.dedent(inspect.getsource(cast(Any, stock).forward))
    except OSError:
        raise ValueError("it is not as transformers builds it; convert the model before any wrapping") from None
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    return function, function.body[1:] if ast.get_docstring(function) else function.body


@functools.cache
def _names_in_forward(stock: type) -> frozenset[str]:
    function, _ = _forward(stock)
    return frozenset(re.findall(r"\bself\.(\w+)", ast.unparse(function)))


def _read_attention_half(
    layer: nn.Module, function: ast.FunctionDef, lines: list[ast.stmt]
) -> tuple[AttentionCall, bool]:
    """The call between ``input_layernorm`` and the addition, and whether what is added is multiplied."""
    norm, addition = ast.unparse(lines[0]), ast.unparse(lines[-1])
    added = re.fullmatch(rf"hidden_states = residual \+ (\w+)( \* self\.{MULTIPLIER})?", addition)
    if len(lines) != 3 or norm != "hidden_states = self.input_layernorm(hidden_states)" or not added:
        raise ValueError("it does not compute what a stock pre-norm layer does")
    return _read_call(layer, function, lines[1], added[1]), added[2] is not None


def _read_call(layer: nn.Module, function: ast.FunctionDef, line: ast.stmt, output: str) -> AttentionCall:
    while isinstance(line, ast.If):  # one kind of layer or another
        chosen = line.body if _holds(layer, ast.unparse(line.test)) else line.orelse
        if len(chosen) != 1:
            raise ValueError("it does not compute what a stock pre-norm layer does")
        line = chosen[0]
    named = {argument.arg for argument in function.args.args} - {"self", "hidden_states"}
    found = re.fullmatch(rf"{output}(, _)? = self\.(\w+)\(.*\)", ast.unparse(line), re.DOTALL)
    if not found or not isinstance(line, ast.Assign) or not isinstance(line.value, ast.Call) or line.value.args:
        raise ValueError("it does not compute what a stock pre-norm layer does")
    passed = {keyword.arg: ast.unparse(keyword.value) for keyword in line.value.keywords}
    if passed.pop("hidden_states", None) != "hidden_states":
        raise ValueError("its attention is called in another way than a stock layer's")
    rest = passed.pop(None, None)
    if (rest or "kwargs") != "kwargs" or not named >= set(passed.values()):
        raise ValueError("its attention is called in another way than a stock layer's")
    renamed = tuple((here, there) for there, here in passed.items() if there is not None and there != here)
    kept = frozenset(there for there, here in passed.items() if there is not None and there == here)
    return AttentionCall(found[2], renamed, frozenset(named - kept), rest is not None, kept, found[1] is not None)


def _holds(layer: nn.Module, condition: str) -> bool:
    """Whether a condition that tells a layer's kind holds for this one."""
    if found := re.fullmatch(r"self\.block_type == '(\w+)'", condition):
        return bool(cast(Any, layer).block_type == found[1])
    if found := re.fullmatch(r"self\.(\w+) is not None", condition):
        return getattr(layer, found[1], None) is not None
    raise ValueError(f"it depends on {condition}, which is unknown here")
