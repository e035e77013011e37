"""Attention of the measured layers as plain torch modules, in the two halves that ``OverlappedLayer`` asks for.

Causal, with rotary embeddings, over sequences of one length that lie one after the other; no dropout, no cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

ROTARY_BASE = 10000.0
EPSILON = 1e-6
Projected = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class LatentSizes:
    """Multi-head latent attention as DeepSeek-V2-Lite has it: queries uncompressed, keys and values from one latent.

    nope, rope: columns of a head's query and key without and with rotary embedding.
    """

    heads: int = 16
    latent: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128


@dataclass(frozen=True)
class GroupedSizes:
    """Grouped-query attention with normed queries and keys, as Qwen3 has it."""

    heads: int = 32
    key_value_heads: int = 4
    width: int = 128


class Core:
    """torch's SDPA by one backend: on a GPU cuDNN where it takes these tensors in both directions, else
    FlashAttention, for which values are padded to the width of keys."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Tensors as ``__call__`` will get them, to try the backends on."""
        self.backend: SDPBackend | None = None
        self.name = "torch"
        if query.device.type != "cuda":
            return
        reasons = []
        for backend, name in ((SDPBackend.CUDNN_ATTENTION, "cuDNN"), (SDPBackend.FLASH_ATTENTION, "FlashAttention")):
            self.backend, self.name = backend, name
            try:
                with torch.enable_grad():
                    leaves = [each.detach().requires_grad_() for each in (query, key, value)]
                    torch.autograd.grad(self(*leaves).float().sum(), leaves)
                torch.cuda.synchronize()
                return
            except RuntimeError as error:
                reasons.append(f"{name}: {error}")
        raise RuntimeError("No backend of scaled_dot_product_attention takes these tensors. " + " ".join(reasons))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, L, heads, width] each, values perhaps narrower and keys and values of fewer heads; [B, L, heads, V]."""
        width = value.shape[-1]
        if self.backend == SDPBackend.FLASH_ATTENTION:
            value = pad(value, (0, query.shape[-1] - width))
        with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            result = scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True,
                enable_gqa=query.shape[2] != key.shape[2],
            )  # fmt: skip
        return result.transpose(1, 2)[..., :width]


class _Rotary(nn.Module):
    cosine: Tensor
    sine: Tensor

    def __init__(self, width: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        frequencies = ROTARY_BASE ** (-torch.arange(0, width, 2, device=device) / width)
        angles = torch.arange(length, device=device)[:, None, None] * frequencies
        self.register_buffer("cosine", angles.cos().to(dtype))
        self.register_buffer("sine", angles.sin().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, heads, width]; the first half of the columns is turned against the second."""
        first, second = x.chunk(2, dim=-1)
        turned = torch.addcmul(first * self.cosine, second, self.sine, value=-1)
        return torch.cat((turned, torch.addcmul(second * self.cosine, first, self.sine)), dim=-1)


class SplitInTwo(nn.Module, ABC):
    """Attention over [T, H], T a multiple of the sequences' length; a ``SplitAttention`` once it has its ``core``."""

    out: nn.Module
    core: Core

    @abstractmethod
    def project(self, hidden_states: Tensor) -> Projected:
        """Queries, keys and values, each [B, L, heads, width]."""

    def attend(self, projected: Projected) -> Tensor:
        return self.out(self.core(*projected).flatten(2).flatten(0, 1))


class LatentAttention(SplitInTwo):
    def __init__(self, hidden: int, sizes: LatentSizes, length: int, **options: Any) -> None:
        super().__init__()
        self.sizes, self.length = sizes, length
        heads = sizes.heads
        self.query = nn.Linear(hidden, heads * (sizes.nope + sizes.rope), bias=False, **options)
        self.compress = nn.Linear(hidden, sizes.latent + sizes.rope, bias=False, **options)
        self.norm = nn.RMSNorm(sizes.latent, eps=EPSILON, **options)
        self.expand = nn.Linear(sizes.latent, heads * (sizes.nope + sizes.value), bias=False, **options)
        self.rotary = _Rotary(sizes.rope, length, **options)
        self.out = nn.Linear(heads * sizes.value, hidden, bias=False, **options)

    def project(self, hidden_states: Tensor) -> Projected:
        sizes = self.sizes
        plain, turned = self._heads(self.query(hidden_states)).split([sizes.nope, sizes.rope], dim=-1)
        query = torch.cat((plain, self.rotary(turned)), dim=-1)
        latent, shared = self.compress(hidden_states).split([sizes.latent, sizes.rope], dim=-1)
        plain, value = self._heads(self.expand(self.norm(latent))).split([sizes.nope, sizes.value], dim=-1)
        shared = self.rotary(self._heads(shared, 1))
        key = torch.cat((plain, shared.expand(-1, -1, sizes.heads, -1)), dim=-1)
        return query, key, value

    def _heads(self, columns: Tensor, heads: int | None = None) -> Tensor:
        return columns.unflatten(1, (heads or self.sizes.heads, -1)).unflatten(0, (-1, self.length))


class GroupedAttention(SplitInTwo):
    def __init__(self, hidden: int, sizes: GroupedSizes, length: int, **options: Any) -> None:
        super().__init__()
        self.sizes, self.length = sizes, length
        queries, keys = sizes.heads * sizes.width, sizes.key_value_heads * sizes.width
        self.widths = (queries, keys, keys)
        self.query_key_value = nn.Linear(hidden, sum(self.widths), bias=False, **options)
        self.query_norm, self.key_norm = (nn.RMSNorm(sizes.width, eps=EPSILON, **options) for _ in range(2))
        self.rotary = _Rotary(sizes.width, length, **options)
        self.out = nn.Linear(queries, hidden, bias=False, **options)

    def project(self, hidden_states: Tensor) -> Projected:
        query, key, value = (
            each.unflatten(-1, (-1, self.sizes.width)).unflatten(0, (-1, self.length))
            for each in self.query_key_value(hidden_states).split(self.widths, dim=-1)
        )
        return self.rotary(self.query_norm(query)), self.rotary(self.key_norm(key)), value


def make_attention(
    hidden: int, sizes: LatentSizes | GroupedSizes, length: int, **options: Any
) -> LatentAttention | GroupedAttention:
    """Attention of these sizes over sequences of ``length`` tokens; options: device, dtype."""
    if isinstance(sizes, LatentSizes):
        return LatentAttention(hidden, sizes, length, **options)
    return GroupedAttention(hidden, sizes, length, **options)
