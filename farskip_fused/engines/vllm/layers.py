"""A decoder layer of vLLM with FarSkip connectivity.

One class serves all families: a dynamic subclass of the stock layer class with its own ``forward``. All that a layer is
made of stays vLLM's. ``connectivity.advance`` is the definition of what it computes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size

from farskip_fused.engines.vllm import all_reduce
from farskip_fused.engines.vllm.expert_parallel import leave_under_way
from farskip_fused.engines.wiring import Wiring, read_wirings
from farskip_fused.errors import UsageError


class FarSkipLayer:
    """The behaviour of a decoder layer, mixed into the stock class; for experts that are whole on every rank."""

    wiring: Wiring
    mlp_name: str

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """hidden_states, residual: [tokens, hidden], as ``engines.wiring`` says; further arguments: the attention's."""
        layer, wiring = cast(Any, self), self.wiring
        if residual is None:
            full: Tensor | None = hidden_states
            attended = layer.self_attn(positions, layer.input_layernorm(hidden_states), *args, **kwargs)
        elif wiring.reads_partial:
            full = None
            attended = layer.self_attn(positions, layer.input_layernorm(residual), *args, **kwargs)
            self.await_routed(hidden_states, attended)
        else:
            normed, full = layer.input_layernorm(hidden_states, residual)
            attended = layer.self_attn(positions, normed, *args, **kwargs)

        if wiring.mlp_first:
            if full is None:
                mlp_input, full = layer.post_attention_layernorm(hidden_states, residual)
            else:
                mlp_input = layer.post_attention_layernorm(full)
            return self.add_mlp(mlp_input, full, attended)
        if full is None:
            assert residual is not None
            full = hidden_states + residual
        mlp_input, full = layer.post_attention_layernorm(attended, full)
        return self.add_mlp(mlp_input, full, None)

    def await_routed(self, hidden_states: Tensor, attended: Tensor) -> None:
        """Makes sure that the routed output of the layer before is complete."""

    def add_mlp(self, mlp_input: Tensor, stream: Tensor, attended: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the layer returns, from its MLP's normed input, the stream so far and what is still to be added."""
        if attended is not None:
            stream = stream + attended
        if not self.wiring.splits:
            return self.block(mlp_input), stream
        shared, routed = shared_and_routed(self.block, mlp_input)
        return routed, stream if shared is None else stream + shared

    @property
    def block(self) -> Any:
        return getattr(self, self.mlp_name)


class ExchangingFarSkipLayer(FarSkipLayer):
    """The same where tokens travel to experts of other ranks: they come back while the next layer's attention runs."""

    def await_routed(self, hidden_states: Tensor, attended: Tensor) -> None:
        all_reduce.finish(hidden_states, attended, all_reduce.ROUTED)

    def add_mlp(self, mlp_input: Tensor, stream: Tensor, attended: Tensor | None) -> tuple[Tensor, Tensor]:
        routed, stream = super().add_mlp(mlp_input, stream, attended)
        if self.wiring.splits:
            all_reduce.start(routed, stream, all_reduce.ROUTED)
        return routed, stream


class ParallelFarSkipLayer(FarSkipLayer):
    """The same where ranks hold parts of attention and experts, whose outputs are to be summed over the ranks.

    Attention's sum, and with it the shared experts', is under way while the routed experts run; theirs is under way
    while the next layer's attention runs, or, without ``leaves_under_way``, ends with the layer. Dense layers sum as
    the stock ones do.
    """

    leaves_under_way: bool

    def await_routed(self, hidden_states: Tensor, attended: Tensor) -> None:
        if self.leaves_under_way:
            all_reduce.finish(hidden_states, attended, all_reduce.ROUTED)

    def add_mlp(self, mlp_input: Tensor, stream: Tensor, attended: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.wiring.is_moe:
            return super().add_mlp(mlp_input, stream, attended)
        parts = [part for part in (attended, self.shared_output(mlp_input)) if part is not None]
        if not parts:
            routed = self.block(mlp_input)
            if self.wiring.splits:
                self.start_routed(routed, stream)
            return routed, stream
        early = sum(parts[1:], parts[0])
        all_reduce.start(early, mlp_input, all_reduce.ATTENTION)
        routed = self.block(mlp_input)
        if self.wiring.splits:
            self.start_routed(routed, early)
        all_reduce.finish(early, routed, all_reduce.ATTENTION)
        return routed, stream + early

    def start_routed(self, routed: Tensor, before: Tensor) -> None:
        all_reduce.start(routed, before, all_reduce.ROUTED)
        if not self.leaves_under_way:
            all_reduce.finish(routed, before, all_reduce.ROUTED)

    def shared_output(self, mlp_input: Tensor) -> Tensor | None:
        """This rank's part, where the shared experts do not run inside the block."""
        shared = shared_experts(self.block) if self.wiring.splits else None
        return None if shared is None else shared(mlp_input)


def wire(decoder: nn.Module, vllm_config: VllmConfig) -> None:
    """Puts the FarSkip class on all layers that do other than the stock ones.

    Raises UsageError for a checkpoint whose record is damaged, and for layers that are built in a way unknown here.
    """
    layers = list(cast(Iterable[nn.Module], decoder.layers))
    names = ["mlp" if hasattr(layer, "mlp") else "feed_forward" for layer in layers]
    is_moe = [hasattr(getattr(layer, name), "experts") for layer, name in zip(layers, names, strict=True)]
    wirings = read_wirings(vllm_config.model_config.hf_config.farskip, is_moe)
    over_ranks = get_tensor_model_parallel_world_size() > 1
    if over_ranks:
        all_reduce.set_up(vllm_config)
    # A draft model that taps the streams between layers reads hidden_states + residual there.
    leaves_under_way = vllm_config.speculative_config is None
    behaviour: Any = ParallelFarSkipLayer if over_ranks else FarSkipLayer
    for layer, name, wiring in zip(layers, names, wirings, strict=True):
        if wiring.is_stock:
            continue
        block = cast(Any, getattr(layer, name))
        if wiring.splits:
            check_splits(block)
            if leaves_under_way and leave_under_way(block.experts):
                behaviour = ExchangingFarSkipLayer  # and of the layers after it, which await what it leaves
        layer.__class__ = _subclass(behaviour, cast(Any, type(layer)))
        rewired = cast(Any, layer)
        rewired.wiring, rewired.mlp_name = wiring, name
        if over_ranks:
            rewired.leaves_under_way = leaves_under_way
            rewired.self_attn.o_proj.reduce_results = not (wiring.is_moe and wiring.mlp_first)
            if wiring.splits:
                leave_parts(block)


@functools.cache
def _subclass(behaviour: type[FarSkipLayer], stock: type) -> type:
    return type(stock.__name__, (behaviour, stock), {"__module__": stock.__module__})


def shared_experts(block: Any) -> Any:
    """The shared experts of a block; None if it has none."""
    return getattr(block, "shared_experts", None) or getattr(block, "shared_expert", None)


def shared_and_routed(block: Any, hidden_states: Tensor) -> tuple[Tensor | None, Tensor]:
    """Both outputs of a block [tokens, hidden]; what the block's own ``forward`` does, short of adding them.

    vLLM's runner computes both in one operator, the shared experts on a stream of their own where that pays.
    """
    runner = block.experts
    if runner.shared_experts is None:
        return None, block(hidden_states)
    logits = hidden_states if runner.gate is not None else block.router(hidden_states)[0]
    hidden_states, shared_input = runner.apply_routed_input_transform(hidden_states)
    outputs = runner._forward_entry(hidden_states, logits, shared_input, None, runner._encode_layer_name(), 0)
    return runner._maybe_apply_routed_scale_to_output(*outputs)


def check_splits(block: Any) -> None:
    """UsageError for a block that ``shared_and_routed`` or ``leave_parts`` would take for something else."""
    runner = block.experts
    used = ("gate", "_forward_entry", "_select_forward", "_encode_layer_name", "_maybe_apply_routed_scale_to_output")
    lacking = [name for name in used if not hasattr(runner, name)]
    if not hasattr(runner.moe_config, "skip_final_all_reduce"):
        lacking.append("skip_final_all_reduce")
    if lacking or runner.routed_output_transform is not None:
        what = f"it lacks {', '.join(lacking)}" if lacking else "it projects its experts' output"
        raise UsageError(
            f"{type(block).__name__} cannot be split into shared and routed experts in this vLLM: {what}; install vLLM "
            "0.26 to 0.33."
        )


def leave_parts(block: Any) -> None:
    """Takes the shared experts out of a block's ``forward``, and the sum over the ranks."""
    runner = block.experts
    runner.moe_config.skip_final_all_reduce = True
    runner._shared_experts = None
    runner._forward_entry = runner._select_forward()
