"""The types of converted checkpoints that SGLang reads."""

from __future__ import annotations

from farskip_fused.engines.configs import served
from farskip_fused.record import TYPE_PREFIX

STOCK_TYPES = ("deepseek_v2", "deepseek_v3", "qwen3_moe")


def register() -> None:
    """Makes SGLang read converted checkpoints; may be called again."""
    # SGLang asks its own view of transformers, which has more types than transformers' own.
    from sglang.srt.utils.hf_transformers.common import AutoConfig

    for stock_type in STOCK_TYPES:
        AutoConfig.register(TYPE_PREFIX + stock_type, served(stock_type), exist_ok=True)
