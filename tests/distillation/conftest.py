"""A tiny stock model with a head, and text that it can learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

VOCABULARY = 64


@pytest.fixture
def build() -> Callable[..., Any]:
    """``build(**config)``: a DeepSeek-V3-shaped model, the same one for a seed, in which conversion does damage."""

    def build(seed: int = 0, **overrides: Any) -> Any:
        settings: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 4,
            "first_k_dense_replace": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "kv_lora_rank": 16,
            "q_lora_rank": None,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "max_position_embeddings": 64,
            "initializer_range": 0.15,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        torch.manual_seed(seed)
        config = transformers.DeepseekV3Config(**(settings | overrides))
        return transformers.DeepseekV3ForCausalLM(config).eval()

    return build


@pytest.fixture
def blocks() -> Tensor:
    """Blocks [96, 16] in which each id is followed by its successor or, rarely, by any id."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCABULARY, (96, 16), generator=generator)
    jumps = torch.rand(96, 16, generator=generator) < 0.1
    for position in range(1, 16):
        following = (ids[:, position - 1] + 1) % VOCABULARY
        ids[:, position] = torch.where(jumps[:, position], ids[:, position], following)
    return ids
