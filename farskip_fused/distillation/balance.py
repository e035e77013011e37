"""Keeps experts evenly used while a model is trained, without a loss term."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from farskip_fused.distillation.parallel import Parallel
from farskip_fused.errors import UsageError
from farskip_fused.router_losses import update_correction_bias


class ExpertBalance:
    """DeepSeek-V3's balancing (arXiv 2412.19437, section 2.1.2) for routers with an ``e_score_correction_bias`` buffer.

    Within it (a context manager) tokens are counted. At every ``step`` the bias of an expert that got more than its
    share of them falls by ``rate``, that of one that got less rises. The bias chooses experts only; it does not weigh
    them.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        from farskip_fused.conversion import moe_blocks

        routers = [cast(nn.Module, block.gate) for _, block in moe_blocks(model)]
        biases = [getattr(router, "e_score_correction_bias", None) for router in routers]
        self._biases = [bias for bias in biases if isinstance(bias, Tensor)]
        if not self._biases or len(self._biases) < len(routers):
            raise UsageError(
                f"The routers of the {type(model).__name__} have no correction bias; set balance_rate to 0."
            )
        self._rate = rate
        self._tokens = [torch.zeros_like(bias, dtype=torch.int64) for bias in self._biases]
        self._routers = routers

    def __enter__(self) -> ExpertBalance:
        pairs = zip(self._routers, self._tokens, strict=True)
        self._hooks = [router.register_forward_hook(_counting(tokens)) for router, tokens in pairs]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def step(self, parallel: Parallel) -> None:
        """Moves the biases by the tokens counted since the last step, at all ranks."""
        for bias, tokens in zip(self._biases, self._tokens, strict=True):
            update_correction_bias(bias, tokens, self._rate, dist.group.WORLD if parallel.world > 1 else None)
            tokens.zero_()


def _counting(tokens: Tensor) -> Any:
    def count(router: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if router.training:
            tokens.add_(torch.bincount(output[2].flatten(), minlength=len(tokens)))

    return count
