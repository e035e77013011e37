"""A decoder layer of SGLang with FarSkip connectivity.

A dynamic subclass of the stock layer class with its own ``forward``. All that a layer is made of stays SGLang's, its
communicator for what runs as in a stock layer included. ``connectivity.advance`` is the definition of what it computes.

Attention, the shared experts and the routed ones leave outputs that are to be summed over the ranks. The sum of the
first two is under way while the routed experts run; that of the third while the next layer's attention runs, where that
does not read it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.communicator import get_attn_tp_context
from sglang.srt.models.deepseek_v2 import DeepseekV2DecoderLayer
from sglang.srt.models.qwen3_moe import Qwen3MoeDecoderLayer
from sglang.srt.runtime_context import get_forward
from torch import Tensor, nn

from farskip_fused.engines.sglang import all_reduce
from farskip_fused.engines.wiring import Wiring, read_wirings


class FarSkipLayer:
    """The behaviour of a decoder layer, mixed into the stock class; hidden_states, residual: ``engines.wiring``."""

    wiring: Wiring

    def run(
        self, hidden_states: Tensor, residual: Tensor | None, batch: Any, attention: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """hidden_states, residual: [tokens, hidden]; attention: from the normed stream to this rank's part of it."""
        layer, wiring = cast(Any, self), self.wiring
        if wiring.reads_partial:
            full: Tensor | None = None
            attended = attention(layer.layer_communicator.prepare_attn(residual, None, batch)[0])
            all_reduce.finish(hidden_states)
        else:
            normed, full = layer.layer_communicator.prepare_attn(hidden_states, residual, batch)
            attended = attention(normed)

        if wiring.mlp_first:
            if full is None:
                mlp_input, full = layer.post_attention_layernorm(hidden_states, residual)
            else:
                mlp_input = layer.post_attention_layernorm(full)
            return self.add_mlp(mlp_input, full, attended, batch)
        if full is None:
            assert residual is not None
            full = hidden_states + residual
        mlp_input, full = layer.layer_communicator.prepare_mlp(attended, full, batch)
        return self.add_mlp(mlp_input, full, None, batch)

    def add_mlp(self, mlp_input: Tensor, stream: Tensor, attended: Tensor | None, batch: Any) -> tuple[Tensor, Tensor]:
        """What the layer returns, from its MLP's normed input, the stream so far and what is still to be added."""
        block = cast(Any, self).mlp
        if not self.wiring.is_moe:
            if attended is not None:
                stream = stream + tensor_model_parallel_all_reduce(attended)
            return block(mlp_input, batch), stream

        shared = self.shared_output(mlp_input) if self.wiring.splits else None
        parts = [part for part in (attended, shared) if part is not None]
        early = all_reduce.start(sum(parts[1:], parts[0])) if parts else None
        with get_forward().scoped(fuse_mlp_allreduce=True):  # which leaves the sum over the ranks to others
            routed = self.routed_output(mlp_input) if self.wiring.splits else block(mlp_input, batch)
        routed = all_reduce.start(routed)
        if early is not None:
            all_reduce.finish(early)
            stream = stream + early
        if not self.wiring.splits:
            all_reduce.finish(routed)
        return routed, stream

    def shared_output(self, mlp_input: Tensor) -> Tensor | None:
        """This rank's part of the shared experts [tokens, hidden]; None if there are none."""
        return None

    def routed_output(self, mlp_input: Tensor) -> Tensor:
        """This rank's part of the routed experts [tokens, hidden]; may overwrite ``mlp_input``."""
        return cast(Any, self).mlp.forward_normal(mlp_input)


class FarSkipDeepseekLayer(FarSkipLayer):
    """DeepSeek-V2's and -V3's; the arguments beyond Qwen3-MoE's serve kernels and models that are not served here."""

    def forward(
        self,
        positions: Tensor,
        hidden_states: Tensor,
        forward_batch: Any,
        residual: Tensor | None,
        zero_allocator: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, None]:
        def attention(normed: Tensor) -> Tensor:
            attended = cast(Any, self).self_attn(positions, normed, forward_batch, zero_allocator)
            get_attn_tp_context().clear_attn_inputs()
            return attended

        return *self.run(hidden_states, residual, forward_batch, attention), None

    def shared_output(self, mlp_input: Tensor) -> Tensor | None:
        block = cast(Any, self).mlp
        return block.shared_experts(mlp_input) if hasattr(block, "shared_experts") else None

    def routed_output(self, mlp_input: Tensor) -> Tensor:
        return cast(Any, self).mlp.forward_normal(mlp_input, skip_shared_experts=True)


class FarSkipQwen3MoeLayer(FarSkipLayer):
    def forward(
        self,
        positions: Tensor,
        hidden_states: Tensor,
        forward_batch: Any,
        residual: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        def attention(normed: Tensor) -> Tensor:
            return cast(Any, self).self_attn(positions, normed, forward_batch)

        return self.run(hidden_states, residual, forward_batch, attention)


BEHAVIOURS = {DeepseekV2DecoderLayer: FarSkipDeepseekLayer, Qwen3MoeDecoderLayer: FarSkipQwen3MoeLayer}


def wire(decoder: nn.Module, record: Any) -> None:
    """Puts the FarSkip class on all layers that do other than the stock ones.

    record: the ``"farskip"`` entry of the checkpoint's configuration. Raises UsageError if it is damaged.
    """
    layers = [cast(Any, layer) for layer in cast(Iterable[nn.Module], decoder.layers)]
    for layer, wiring in zip(
        layers, read_wirings(record, [hasattr(layer.mlp, "experts") for layer in layers]), strict=True
    ):
        if not wiring.is_stock:
            layer.__class__ = _subclass(cast(Any, type(layer)))
            layer.wiring = wiring


@functools.cache
def _subclass(stock: type) -> type:
    return type(stock.__name__, (BEHAVIOURS[stock], stock), {"__module__": stock.__module__})
