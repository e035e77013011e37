"""The types of converted checkpoints that vLLM reads."""

from __future__ import annotations

from farskip_fused.engines.configs import served
from farskip_fused.record import TYPE_PREFIX

STOCK_TYPES = ("deepseek_v2", "deepseek_v3", "llama4_text", "qwen3_moe")


def register() -> None:
    """Makes vLLM read converted checkpoints; may be called again."""
    from vllm.transformers_utils import config as vllm_config

    for stock_type in STOCK_TYPES:
        # vLLM gives a class from this table to transformers just before it reads a checkpoint. Registered there once,
        # it could be gone by then: farskip_fused.conversion registers its own classes for these types.
        vllm_config._CONFIG_REGISTRY[TYPE_PREFIX + stock_type] = served(stock_type)
