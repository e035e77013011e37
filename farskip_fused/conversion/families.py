"""The names of model families, which are transformers' types. Free of torch.

What a family's layers look like is not written down here but read from them (anatomy.py); this list only says which
types transformers' Auto classes shall know in their converted form. A model of another type converts too if its layers
are built alike.
"""

from __future__ import annotations

FAMILIES = (
    "aria",
    "aria_text",
    "axk2",
    "bailing_hybrid",
    "deepseek_ocr2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "dots3_note",
    "dots3_note_text",
    "ernie4_5_moe",
    "exaone_moe",
    "flint",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "instella_moe",
    "jamba",
    "kimi_linear",
    "laguna",
    "llama4",
    "llama4_text",
    "mellum",
    "mimo_v2_flash",
    "minimax_m2",
    "minimax_m3_vl",
    "mistral4",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl_moe",
    "solar_open",
    "step3p7",
    "unlimited_ocr",
)
