"""Tiny random models of every supported family, and FarSkip as the paper writes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
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
QWEN: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 8}
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
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "vision_output_dim": 16,
    "pixel_shuffle_ratio": 0.5,
}
FAMILY: dict[str, dict[str, Any]] = {
    "deepseek_v2": DEEPSEEK | LATENT | GROUPS | {"q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": DEEPSEEK | LATENT | GROUPS,
    "dots1": DEEPSEEK | {"head_dim": 8, "n_group": 2, "topk_group": 1},
    "ernie4_5_moe": {"moe_intermediate_size": 16, "moe_num_experts": 8, "moe_k": 3, "moe_layer_interval": 2},
    "glm4_moe": DEEPSEEK | {"head_dim": 8, "n_group": 2, "topk_group": 1},
    "glm4_moe_lite": DEEPSEEK | LATENT | {"mlp_layer_types": ["dense"] + ["sparse"] * 4},
    "llama4": {},  # see tiny
    "llama4_text": LLAMA4,
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 3, "head_dim": 8},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 8},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 2},
    "qwen3_moe": QWEN,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, by far where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """``tiny(model_type, dtype=torch.float64, **config)``: a stock model in eval mode, the same one for a seed."""

    def build(model_type: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
        settings = COMMON | FAMILY[model_type] | {"experts_implementation": "eager"} | overrides
        build_from: Any = transformers.AutoModelForCausalLM
        if model_type == "llama4":
            text = COMMON | LLAMA4 | overrides
            settings = {"text_config": text, "vision_config": VISION, "image_token_index": 60}
            build_from = transformers.AutoModelForImageTextToText
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(model_type, **settings)
        model = build_from.from_config(config, dtype=dtype)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.uniform_(buffer, 0.0, 0.2)
        # As it is, a model that reads images would lose the imaginary parts of its rotations.
        return (model if model_type == "llama4" else model.to(dtype)).eval()

    return build


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    return torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def paper() -> Callable[..., tuple[Tensor, list[Tensor]]]:
    """``paper(stock, tokens, attention, mlp)``: logits and o_0 .. o_L-1 by the equations of the paper.

    attention, mlp: the layers whose attention reads the partial input and whose MLP reads the outdated one. Works on
    the unconverted modules and keeps o, attention and shared outputs of every layer by name; nothing of the package.
    """

    def run(stock: Any, tokens: Tensor, attention: set[int], mlp: set[int]) -> tuple[Tensor, list[Tensor]]:
        stock = text_model(stock)
        arguments = _layer_arguments(stock, tokens)
        before = stock.model.embed_tokens(tokens)
        o: dict[int, Tensor] = {-2: before, -1: before}
        attended: dict[int, Tensor] = {}
        shared: dict[int, Tensor] = {}
        for k, layer in enumerate(stock.model.layers):
            attention_input = o[k - 1]
            if k in attention and k - 1 in shared:
                attention_input = (o[k - 2] + attended[k - 1]) + shared[k - 1]
            attended[k], _ = layer.self_attn(hidden_states=layer.input_layernorm(attention_input), **arguments[k])
            mlp_input = layer.post_attention_layernorm(o[k - 1] if k in mlp else o[k - 1] + attended[k])
            o[k] = (o[k - 1] + attended[k]) + _output(mlp_of(layer), mlp_input)
            if hasattr(mlp_of(layer), "experts"):
                shared[k] = _output(_without_routed_experts(mlp_of(layer)), mlp_input)
        logits = stock.lm_head(stock.model.norm(o[len(stock.model.layers) - 1]))
        return logits, [o[k] for k in range(len(stock.model.layers))]

    return run


def text_model(model: Any) -> Any:
    """The causal language model of one that also reads images; others are it."""
    return getattr(model, "language_model", model)


def mlp_of(layer: Any) -> Any:
    return layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp


def _output(mlp: Any, hidden_states: Tensor) -> Tensor:
    """Llama-4's blocks return their flattened output with the router's logits."""
    output = mlp(hidden_states)
    return output[0].view(hidden_states.shape) if isinstance(output, tuple) else output


def _layer_arguments(stock: Any, tokens: Tensor) -> list[dict[str, Any]]:
    """What the model hands to each layer's attention: mask, positions and rotary embeddings."""
    seen: list[dict[str, Any]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _module, _args, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
        for layer in stock.model.layers
    ]
    stock(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def _without_routed_experts(block: Any) -> Any:
    silent = copy.deepcopy(block)
    torch.nn.init.zeros_(silent.experts.down_proj)
    return silent
