"""The sizes of a model that its layer times depend on: named models, and any config.json of a supported family.

Read as JSON, without torch or transformers. The families are those of ``conversion.families``; a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farskip_fused.errors import UsageError

CONFIG = "config.json"
TYPE_PREFIX = "farskip_"  # of converted checkpoints


@dataclass(frozen=True)
class Model:
    """Sizes of one model.

    query_head, value_head: size of a head of queries and keys, and of values.
    query_rank, latent_rank, rope_head: of latent attention (MLA); 0 where queries are not compressed, or all 0 where
        the attention is not of that kind.
    shared: intermediate size of all shared experts of a layer together.
    groups, groups_of_token: a token's experts come from so many of so many groups (1 of 1: no limit).
    chunk: tokens that three of four layers attend over at most (Llama-4); 0 without.
    head_norms: whether each head's query and key are normed.
    """

    name: str
    hidden: int
    layers: int
    moe_layers: int
    heads: int
    key_value_heads: int
    query_head: int
    value_head: int
    experts: int
    top_k: int
    intermediate: int
    shared: int
    dense_intermediate: int
    vocabulary: int
    query_rank: int = 0
    latent_rank: int = 0
    rope_head: int = 0
    groups: int = 1
    groups_of_token: int = 1
    chunk: int = 0
    head_norms: bool = False

    def replicated_attention(self) -> int:
        """Parameters of the attention's projections that tensor parallelism does not split: those into latents."""
        if not self.latent_rank:
            return 0
        return self.hidden * (self.query_rank + self.latent_rank + self.rope_head)

    def split_attention(self) -> int:
        """Parameters of the attention's projections that it splits, output projection included."""
        queries = self.heads * self.query_head * (self.query_rank or self.hidden)
        output = self.heads * self.value_head * self.hidden
        if self.latent_rank:
            keys_values = self.heads * (self.query_head - self.rope_head + self.value_head) * self.latent_rank
        else:
            keys_values = self.key_value_heads * (self.query_head + self.value_head) * self.hidden
        return queries + keys_values + output

    def attention(self) -> int:
        """Parameters of one layer's attention."""
        return self.replicated_attention() + self.split_attention()

    def expert(self) -> int:
        """Parameters of one routed expert."""
        return 3 * self.hidden * self.intermediate

    def total(self) -> int:
        """Parameters of the model, embedding and output head counted apart, norms left out."""
        moe = self.moe_layers * (self.experts * self.expert() + self.hidden * (3 * self.shared + self.experts))
        dense = (self.layers - self.moe_layers) * 3 * self.hidden * self.dense_intermediate
        return moe + dense + self.layers * self.attention() + 2 * self.vocabulary * self.hidden

    def cached(self) -> int:
        """Numbers that a token leaves in one layer's key-value cache, before it is split over ranks."""
        if self.latent_rank:
            return self.latent_rank + self.rope_head
        return self.key_value_heads * (self.query_head + self.value_head)

    def attended(self, sequence: float) -> float:
        """Tokens that a token at the end of a sequence looks at, averaged over layers."""
        if not self.chunk:
            return sequence
        return 0.75 * min(sequence, self.chunk) + 0.25 * sequence


def _of(config: Mapping[str, Any], *keys: str) -> int:
    """The first of ``keys`` that holds a number; families differ in names. A list per layer gives its last entry."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and value:
            value = value[-1]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    raise UsageError(f"The configuration lacks {' or '.join(keys)}, a whole number.")


def _leading_dense(config: Mapping[str, Any], layers: int) -> int:
    kinds = config.get("mlp_layer_types")
    return int(kinds.count("sparse") if kinds else layers - config.get("first_k_dense_replace", 0))


def _one_leading_dense(config: Mapping[str, Any], layers: int) -> int:
    return _leading_dense({"first_k_dense_replace": 1, **config}, layers)


def _every_step(config: Mapping[str, Any], layers: int) -> int:
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return sum((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def _interleaved(config: Mapping[str, Any], layers: int) -> int:
    listed = config.get("moe_layers")
    return len(listed) if listed else layers // config.get("interleave_moe_layer_step", 1)


def _ernie(config: Mapping[str, Any], layers: int) -> int:
    start, end = config.get("moe_layer_start_index", 1), config.get("moe_layer_end_index", -1)
    end, interval = (layers - 1 if end in (-1, None) else end), config.get("moe_layer_interval", 1)
    return sum(start <= layer <= end and (layer + 1) % interval == 0 for layer in range(layers))


def _shared(config: Mapping[str, Any], size: str | None) -> int:
    """Of all shared experts of a layer; size: the key of one's, None where there are none."""
    if size != EXPERT_SIZE:
        return _of(config, size) if size else 0
    count = config.get("n_shared_experts") or config.get("moe_num_shared_experts") or 0
    return count * _of(config, size) if count else 0


EXPERT_SIZE = "moe_intermediate_size"
# How many layers are MoE layers, and the key of a shared expert's size, by ``model_type``.
FAMILIES: dict[str, tuple[Callable[..., int], str | None]] = {
    "deepseek_v2": (_leading_dense, EXPERT_SIZE),
    "deepseek_v3": (_leading_dense, EXPERT_SIZE),
    "dots1": (_leading_dense, EXPERT_SIZE),
    "ernie4_5_moe": (_ernie, EXPERT_SIZE),
    "glm4_moe": (_one_leading_dense, EXPERT_SIZE),
    "glm4_moe_lite": (_one_leading_dense, EXPERT_SIZE),
    "hunyuan_v1_moe": (_every_step, "intermediate_size"),
    "llama4": (_interleaved, "intermediate_size"),
    "llama4_text": (_interleaved, "intermediate_size"),
    "mixtral": (_every_step, None),
    "olmoe": (_every_step, None),
    "qwen2_moe": (_every_step, "shared_expert_intermediate_size"),
    "qwen3_moe": (_every_step, None),
}


# Whose attention norms queries and keys; others say so in ``use_qk_norm``, which Llama-4 leaves out where it is true.
_HEAD_NORMS = ("dots1", "hunyuan_v1_moe", "llama4", "llama4_text", "olmoe", "qwen3_moe")
# Their experts are of the size that other families give to dense layers.
_NO_OWN_SIZE = ("hunyuan_v1_moe", "llama4", "llama4_text", "mixtral", "olmoe")


def from_config(config: Mapping[str, Any], name: str) -> Model:
    """The sizes in a config.json of a supported family, stock or converted.

    Raises UsageError for another family, which lists the supported ones, and for sizes that are missing.
    """
    family = str(config.get("model_type", "")).removeprefix(TYPE_PREFIX)
    if family not in FAMILIES:
        raise UsageError(f"{name}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}.")
    config = config.get("text_config", config)
    count_moe, shared_size = FAMILIES[family]
    layers, heads = _of(config, "num_hidden_layers"), _of(config, "num_attention_heads")
    hidden = _of(config, "hidden_size")
    latent = family in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
    if latent:
        rope = _of(config, "qk_rope_head_dim")
        sizes: dict[str, Any] = {
            "query_head": _of(config, "qk_nope_head_dim") + rope, "value_head": _of(config, "v_head_dim"),
            "query_rank": config.get("q_lora_rank") or 0, "latent_rank": _of(config, "kv_lora_rank"),
            "rope_head": rope, "key_value_heads": heads,
        }  # fmt: skip
    else:
        head = config.get("head_dim") or hidden // heads
        key_value_heads = config.get("num_key_value_heads") or heads
        sizes = {
            "query_head": head, "value_head": head, "key_value_heads": key_value_heads,
            "head_norms": bool(config.get("use_qk_norm", family in _HEAD_NORMS)),
        }  # fmt: skip
    return Model(
        name=name,
        hidden=hidden,
        layers=layers,
        moe_layers=count_moe(config, layers),
        heads=heads,
        experts=_of(config, "n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
        top_k=_of(config, "num_experts_per_tok", "moe_k", "moe_topk"),
        intermediate=_of(config, "intermediate_size" if family in _NO_OWN_SIZE else EXPERT_SIZE),
        shared=_shared(config, shared_size),
        dense_intermediate=_of(config, "intermediate_size_mlp", "intermediate_size"),
        vocabulary=_of(config, "vocab_size"),
        groups=config.get("n_group") or 1,
        groups_of_token=config.get("topk_group") or 1,
        chunk=config.get("attention_chunk_size") or 0,
        **sizes,
    )


def _deepseek(family: str, **sizes: Any) -> dict[str, Any]:
    heads = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    return {"model_type": family, **heads, **sizes}


# The published config.json of each model, reduced to what is read above.
_CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-v2-lite": _deepseek(
        "deepseek_v2", hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408, intermediate_size=10944,
        first_k_dense_replace=1, vocab_size=102400,
    ),
    "deepseek-v2": _deepseek(
        "deepseek_v2", hidden_size=5120, num_hidden_layers=60, num_attention_heads=128, q_lora_rank=1536,
        n_routed_experts=160, n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1536,
        intermediate_size=12288, first_k_dense_replace=1, vocab_size=102400, n_group=8, topk_group=3,
    ),
    "deepseek-v3": _deepseek(
        "deepseek_v3", hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, q_lora_rank=1536,
        n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
        intermediate_size=18432, first_k_dense_replace=3, vocab_size=129280, n_group=8, topk_group=4,
    ),
    "kimi-k2": _deepseek(
        "deepseek_v3", hidden_size=7168, num_hidden_layers=61, num_attention_heads=64, q_lora_rank=1536,
        n_routed_experts=384, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
        intermediate_size=18432, first_k_dense_replace=1, vocab_size=163840,
    ),
    "llama-4-scout": {
        "model_type": "llama4_text", "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 16, "num_experts_per_tok": 1,
        "intermediate_size": 8192, "intermediate_size_mlp": 16384, "interleave_moe_layer_step": 1,
        "vocab_size": 202048, "attention_chunk_size": 8192,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 14336,
        "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "intermediate_size": 6144, "vocab_size": 151936,
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe", "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 1536, "intermediate_size": 12288, "vocab_size": 151936,
    },
}  # fmt: skip
MODELS = {name: from_config(config, name) for name, config in _CONFIGS.items()}


def find_model(name: str | Path | Model) -> Model:
    """A named model, or the one of a config.json or of a directory that holds one; a ``Model`` is returned as it is.

    Raises UsageError for anything else; it lists the names.
    """
    if isinstance(name, Model):
        return name
    if str(name) in MODELS:
        return MODELS[str(name)]
    path = Path(name) / CONFIG if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise UsageError(f"Unknown model {str(name)!r}; use {', '.join(MODELS)}, or the path of a {CONFIG}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} holds no JSON object; a {CONFIG} of transformers is needed.")
    return from_config(config, str(name))
