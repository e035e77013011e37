"""Tiny random models by transformers' type: five layers, dense ones among them where the family can have some."""

from __future__ import annotations

from typing import Any

import torch
import transformers

LAYERS = 5
COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DEEPSEEK: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
GROUPS = {"n_group": 4, "topk_group": 2}
ONE_DENSE = {"mlp_layer_types": ["dense"] + ["sparse"] * 4}
MIXED_DENSE = {"mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse"]}
INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 32}  # all: ties would make it depend on the cache
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention", "full_attention"]
}
DELTA: dict[str, Any] = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
QWEN: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 8}
GRANITE: dict[str, Any] = {
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
}
LLAMA4: dict[str, Any] = {
    "intermediate_size": 16,
    "intermediate_size_mlp": 24,
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "head_dim": 8,
    "moe_layers": [0, 1, 3],
    "attention_chunk_size": 8,
    "attn_temperature_tuning": False,
}
DOTS3: dict[str, Any] = (
    DEEPSEEK
    | LATENT
    | INDEXER
    | SLIDING
    | ONE_DENSE
    | {"head_dim": 16, "n_group": 2, "topk_group": 1, "shared_experts_intermediate_size": 16}
    | {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8}
    | {"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8}
)
ARIA = {"moe_num_experts": 8, "moe_topk": 3, "moe_num_shared_experts": 2, "intermediate_size": 16}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
LLAMA4_VISION = VISION | {
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "vision_output_dim": 16,
    "pixel_shuffle_ratio": 0.5,
}
TEXT: dict[str, dict[str, Any]] = {
    "aria_text": ARIA,
    "axk2": DEEPSEEK | LATENT | GROUPS | INDEXER | ONE_DENSE,
    "bailing_hybrid": DEEPSEEK | LATENT | GROUPS | LINEAR | {"head_dim": 8, "num_experts": 8},
    "deepseek_v2": DEEPSEEK | LATENT | GROUPS | {"q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": DEEPSEEK | LATENT | GROUPS,
    "deepseek_v32": DEEPSEEK | LATENT | GROUPS | INDEXER | ONE_DENSE,
    "dots1": DEEPSEEK | {"head_dim": 8, "n_group": 2, "topk_group": 1},
    "dots3_note_text": DOTS3,
    "ernie4_5_moe": {"moe_intermediate_size": 16, "moe_num_experts": 8, "moe_k": 3, "moe_layer_interval": 2},
    "exaone_moe": DEEPSEEK
    | {"num_experts": 8, "num_shared_experts": 1, "n_group": 2, "topk_group": 1, "head_dim": 8}
    | SLIDING
    | MIXED_DENSE,
    "flint": QWEN | SLIDING | MIXED_DENSE | {"shared_expert_intermediate_size": 24},
    "glm4_moe": DEEPSEEK | {"head_dim": 8, "n_group": 2, "topk_group": 1},
    "glm4_moe_lite": DEEPSEEK | LATENT | ONE_DENSE,
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 8, "num_key_value_heads": 2} | SLIDING,
    "granitemoe": GRANITE,
    "granitemoe_swa": GRANITE | SLIDING | {"shared_intermediate_size": 24},
    "granitemoehybrid": GRANITE
    | {
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "mamba", "attention", "mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "granitemoeshared": GRANITE | {"shared_intermediate_size": 24},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 3, "head_dim": 8},
    "hy_v3": QWEN | {"num_shared_experts": 1, "first_k_dense_replace": 1, "enable_moe_fp32_combine": False} | ONE_DENSE,
    "jamba": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "kimi_linear": DEEPSEEK | LATENT | LINEAR | {"q_lora_rank": None, "num_experts": 8, "linear_head_dim": 8},
    "laguna": QWEN | MIXED_DENSE | {"shared_expert_intermediate_size": 24} | SLIDING,
    "llama4_text": LLAMA4,
    "mellum": QWEN | MIXED_DENSE | SLIDING,
    "mimo_v2_flash": QWEN
    | SLIDING
    | MIXED_DENSE
    | {
        "v_head_dim": 8,
        "num_key_value_heads": 2,
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 8, "rotary_dim": 4},
    "mistral4": DEEPSEEK | LATENT | {"n_group": 2, "topk_group": 1},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 8},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 2},
    "qwen3_5_moe_text": QWEN | DELTA | LINEAR | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": QWEN,
    "qwen3_next": QWEN | DELTA | LINEAR | {"shared_expert_intermediate_size": 24},
    "solar_open": DEEPSEEK | {"head_dim": 8, "n_group": 1, "topk_group": 1},
}
_SAM = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "output_channels": 8}
_OCR = {"mlp_dim": 32, "downsample_channels": [12, 16], "global_attn_indexes": [0], "window_size": 2}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
PATCHES = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "patch_size": 4,
}
# Text and vision part of models that read images too.
IMAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "aria": (ARIA, VISION | {"model_type": "idefics3_vision"}),
    "deepseek_ocr2": (
        DEEPSEEK | GROUPS | {"topk_method": "group_limited_greedy"} | ONE_DENSE,
        {"sam_config": _SAM | _OCR, "encoder_config": VISION | {"num_key_value_heads": 2}},
    ),
    "dots3_note": (
        DOTS3,
        VISION
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 16,
            "adapter_out_dim": 32,
        },
    ),
    "glm4v_moe": (DEEPSEEK | {"n_group": 2, "topk_group": 1} | {"rope_parameters": _ROPE}, PATCHES),
    "llama4": (LLAMA4, LLAMA4_VISION),
    "minimax_m3_vl": (
        {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 8, "rotary_dim": 4, "index_n_heads": 2}
        | {"index_head_dim": 8, "index_block_size": 4, "dense_intermediate_size": 24, "shared_intermediate_size": 16}
        | ONE_DENSE,
        VISION,
    ),
    "qwen3_5_moe": (
        QWEN | DELTA | LINEAR | {"shared_expert_intermediate_size": 24} | {"rope_parameters": _ROPE},
        PATCHES,
    ),
    "qwen3_vl_moe": (QWEN | {"rope_parameters": _ROPE}, PATCHES | {"deepstack_visual_indexes": [0]}),
    "step3p7": (
        QWEN | SLIDING | MIXED_DENSE | {"n_routed_experts": 8, "num_local_experts": 8, "share_expert_dim": 24},
        VISION,
    ),
    "unlimited_ocr": (
        DEEPSEEK | GROUPS | {"topk_method": "group_limited_greedy"} | ONE_DENSE,
        {"sam_config": _SAM | _OCR, "encoder_config": VISION},
    ),
}


def build(model_type: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A stock model in eval mode, the same one at every call; overrides: entries of the (text part's) configuration."""
    torch.manual_seed(0)
    text, vision = IMAGES[model_type] if model_type in IMAGES else (TEXT[model_type], None)
    text = COMMON | text | overrides
    count = text["num_hidden_layers"]
    text |= {kinds: text[kinds][-count:] for kinds in ["layer_types"] if kinds in text}
    text |= {kinds: text[kinds][:count] for kinds in ["mlp_layer_types"] if kinds in text}
    settings = text if vision is None else {"text_config": text, "vision_config": vision, **_IMAGE_TOKENS}
    config = transformers.AutoConfig.for_model(model_type, **({"experts_implementation": "eager"} | settings))
    reads_images = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto: Any = transformers.AutoModelForImageTextToText if reads_images else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.uniform_(buffer, 0.0, 0.2)
    # As it is, a Llama-4 that reads images would lose the imaginary parts of its rotations.
    return (model if model_type == "llama4" else model.to(dtype)).eval()


_IMAGE_TOKENS = {
    "audio_config": {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "adapter_input_size": 16,
        "adapter_out_dim": 32,
    },
    "image_token_id": 60,
    "image_token_index": 60,
    "projector_hidden_size": 32,
}


ALL = [*TEXT, *IMAGES]
