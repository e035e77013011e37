"""What decoder layers pass on, for losses on the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within it the list grows by o_k [B, T, H] of every decoder layer but the last, in each forward pass.

    The last layer's is left out: what transformers records in its place is behind the final norm, and the divergence of
    the outputs constrains it anyway.
    """
    from farskip_fused.conversion import decoder_layers

    found: list[Tensor] = []

    def note(_module: nn.Module, _arguments: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(note) for layer in decoder_layers(model)[:-1]]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
