"""Models by name and by config.json: the published sizes, every supported family, bad input."""

import json

import pytest
import transformers

from farskip_fused.conversion import FAMILIES as CONVERTED
from farskip_fused.errors import UsageError
from farskip_fused.plan.models import FAMILIES, MODELS, find_model, from_config

# Billions of parameters that the models' cards state.
PUBLISHED = {
    "deepseek-v2-lite": 15.7, "deepseek-v2": 236, "deepseek-v3": 671, "kimi-k2": 1030, "llama-4-scout": 109,
    "mixtral-8x7b": 46.7, "qwen3-30b-a3b": 30.5, "qwen3-235b-a22b": 235,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MODELS))
def test_named_models_have_the_published_number_of_parameters(name):
    assert MODELS[name].total() / 1e9 == pytest.approx(PUBLISHED[name], rel=0.012)


def test_the_families_can_all_be_converted():
    assert set(FAMILIES) <= set(CONVERTED)


SMALL = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "n_routed_experts": 8,
    "n_shared_experts": 1, "head_dim": 16, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
NAMED_APART = {
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
                     "moe_layer_end_index": 3},
    "glm4_moe_lite": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "llama4_text": {"num_local_experts": 8, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 2},
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8},
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 40, "mlp_only_layers": [2]},
    "qwen3_moe": {"num_experts": 8},
}  # fmt: skip


HEAD_NORMS = ("q_norm", "qk_norm", "query_layernorm")


def built_by_transformers(config):
    """The text model, without allocating it."""
    import torch

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def matrices(model):
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.endswith("bias") and "norm" not in name and "embed_tokens" not in name and "lm_head" not in name
    )


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"llama4"}))
def test_a_config_of_every_family_gives_the_sizes_of_the_model_that_transformers_builds(model_type):
    config = transformers.CONFIG_MAPPING[model_type](**(SMALL | NAMED_APART.get(model_type, {})))
    model = from_config(json.loads(config.to_json_string(use_diff=False)), "small")
    counted = model.total() - 2 * model.vocabulary * model.hidden
    # Gates of shared experts and biases of routers, which are vectors.
    built = built_by_transformers(config)
    assert counted == pytest.approx(matrices(built), rel=2e-3)
    assert model.head_norms == any(name.endswith(HEAD_NORMS) for name, _ in built.named_modules())
    assert (model.experts, model.top_k, model.layers) == (8, 2, 4)


def test_converted_and_multimodal_configurations_are_read(tmp_path):
    text = transformers.CONFIG_MAPPING["llama4_text"](**(SMALL | NAMED_APART["llama4_text"])).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "farskip_llama4", "text_config": text}))
    model = find_model(tmp_path)
    assert model.hidden == 64 and model.moe_layers == 2
    assert find_model(tmp_path / "config.json") == model.__class__(
        **{**vars(model), "name": str(tmp_path / "config.json")}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        ('{"model_type": "gpt2"}', "model_type 'gpt2' is not supported; supported are deepseek_v2"),
        ('{"model_type": "mixtral", "hidden_size": 8}', "lacks num_hidden_layers"),
    ],
)
def test_bad_configurations_are_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        find_model(tmp_path)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UsageError, match=r"Unknown model 'gpt-9'; use deepseek-v2-lite, .*qwen3-30b-a3b"):
        find_model("gpt-9")
