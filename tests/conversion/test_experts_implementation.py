"""The kernels as transformers' experts implementation "farskip": equal to eager, on every family that has a choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import farskip_fused as ff
from tests.conversion.conftest import families
from tests.numerics import DEVICE, assert_close

# Whose experts transformers lets one choose.
OTHERS = ["llama4", "llama4_text", "gpt_oss", "minimax_m3_vl", "step3p7"]
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
ARIA = SMALL | {"moe_num_experts": 8, "moe_topk": 3, "moe_num_shared_experts": 1}


def outcome(model: Any, tokens: Any, gradient: Any) -> tuple[Any, dict[str, Any]]:
    model.zero_grad()
    logits = model(tokens).logits
    logits.backward(gradient)
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal_to_eager(model: Any, tokens: Any) -> None:
    tokens = tokens.to(DEVICE)
    gradient = torch.randn(*tokens.shape, 61, device=DEVICE)
    model.set_experts_implementation("eager")
    expected, expected_gradients = outcome(model, tokens, gradient)
    assert ff.use_fused_experts(model) is model
    logits, gradients = outcome(model, tokens, gradient)
    assert_close(logits, expected, torch.float32)
    assert not torch.equal(logits, expected), "the kernels round differently; these did not run"
    assert gradients.keys() == expected_gradients.keys()
    for name, value in gradients.items():
        assert_close(value, expected_gradients[name], torch.float32)


@pytest.mark.parametrize("family", families(["deepseek_v3", "qwen2_moe", "mixtral", "laguna"], without=OTHERS))
def test_every_family_computes_what_eager_computes(family: str, tiny: Any, tokens: Any) -> None:
    # Enough layers for one MoE block in every family.
    model = tiny(family, torch.float32, num_hidden_layers=3 if family == "flint" else 2).to(DEVICE)
    check_equal_to_eager(model, tokens[:, :7])


@pytest.mark.parametrize("connectivity", ["farskip", "standard"])
def test_converted_models_run_on_it_too(connectivity: str, tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny("deepseek_v3", torch.float32, num_hidden_layers=2).to(DEVICE), connectivity)
    check_equal_to_eager(model, tokens)


def test_transposed_weights_are_taken_as_they_are(tokens: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("aria_text", **ARIA))
    experts = model.model.layers[0].mlp.experts
    if not hasattr(experts, "is_transposed"):
        pytest.skip(f"transformers {transformers.__version__} does not let Aria's experts be chosen")
    assert experts.is_transposed
    check_equal_to_eager(model.to(DEVICE), tokens)


def test_odd_sizes(tokens: Any, tiny: Any) -> None:
    model = tiny("qwen3_moe", torch.float32, num_hidden_layers=1, moe_intermediate_size=13, num_experts=5)
    check_equal_to_eager(model.to(DEVICE), tokens)


@pytest.mark.parametrize("converted", [False, True], ids=["stock", "converted"])
def test_torch_compile_takes_the_model_whole(converted: bool, tiny: Any, tokens: Any) -> None:
    model = tiny("qwen3_moe", torch.float32, num_hidden_layers=1).to(DEVICE)
    if converted:
        ff.convert(model)
    ff.use_fused_experts(model)
    tokens = tokens.to(DEVICE)
    gradient = torch.randn(*tokens.shape, 61, device=DEVICE)
    expected, expected_gradients = outcome(model, tokens, gradient)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(tokens).logits
    model.zero_grad()
    logits.backward(gradient)
    assert_close(logits, expected, torch.float32)
    for name, value in expected_gradients.items():
        assert_close(model.get_parameter(name).grad, value, torch.float32)


def test_experts_that_are_elsewhere_are_left_out(tiny: Any) -> None:
    """transformers' expert parallelism writes the number of local experts for them."""
    experts = ff.use_fused_experts(tiny("qwen3_moe", torch.float32).to(DEVICE)).model.layers[0].mlp.experts
    experts._is_expert_parallel = True
    hidden_states, weights = torch.randn(9, 32, device=DEVICE), torch.rand(9, 3, device=DEVICE)
    index = torch.rand(9, 8, device=DEVICE).argsort(dim=-1)[:, :3]
    index[::2, 1] = 8
    present = torch.where(index < 8, weights, 0.0)
    expected = experts(hidden_states, index.clamp(max=7), present)
    assert_close(experts(hidden_states, index, weights), expected, torch.float32)


def test_saved_and_loaded_by_name(tiny: Any, tokens: Any, tmp_path: Any) -> None:
    model = ff.use_fused_experts(tiny("mixtral", torch.float32, num_hidden_layers=1).to(DEVICE))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="farskip").to(DEVICE)
    assert torch.equal(loaded(tokens.to(DEVICE)).logits, model(tokens.to(DEVICE)).logits)


class TestRefused:
    def test_gpt_oss(self) -> None:
        config = transformers.GptOssConfig(**SMALL, num_local_experts=4, head_dim=8)
        model = transformers.GptOssForCausalLM(config)
        with pytest.raises(ff.UsageError, match=r"GptOssExperts has interleaved gate and up rows; the kernels compute"):
            ff.use_fused_experts(model)
        assert model.config._experts_implementation != "farskip"

    @pytest.mark.parametrize(
        ("attribute", "value", "sentence"),
        [
            ("has_gate", False, "no gate"),
            ("has_bias", True, "biases"),
            ("has_post_expert_norm", True, "a norm after each expert"),
            ("act_fn", torch.nn.GELU(), "the activation GELU"),
            ("act_fn", torch.nn.functional.gelu, "the activation gelu"),
        ],
    )
    def test_what_the_kernels_do_not_compute(self, attribute: str, value: Any, sentence: str, tiny: Any) -> None:
        model = tiny("qwen3_moe", torch.float32)
        experts = model.model.layers[3].mlp.experts
        if isinstance(value, torch.nn.Module) or not callable(value):
            setattr(experts, attribute, value)
        else:
            del experts.act_fn
            experts.act_fn = value
        with pytest.raises(ff.UsageError, match=f"Qwen3MoeExperts has {sentence}; "):
            ff.use_fused_experts(model)
        model.set_experts_implementation("farskip")
        with pytest.raises(ff.UsageError, match=f"Qwen3MoeExperts has {sentence}; "):
            experts(torch.zeros(1, 32), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))

    def test_an_activation_of_the_class(self, tiny: Any) -> None:
        model = tiny("qwen3_moe", torch.float32)
        stock = type(model.model.layers[0].mlp.experts)
        for layer in model.model.layers:
            layer.mlp.experts.__class__ = type("Clamped", (stock,), {"_apply_gate": lambda self, x: x})
        with pytest.raises(ff.UsageError, match="Clamped has an activation of its own"):
            ff.use_fused_experts(model)

    def test_double_precision(self, tiny: Any) -> None:
        with pytest.raises(TypeError, match=r"Qwen3MoeExperts is torch.float64"):
            ff.use_fused_experts(tiny("qwen3_moe"))

    def test_models_without_a_choice(self) -> None:
        with pytest.raises(ff.UsageError, match="LlamaForCausalLM has no experts whose implementation"):
            ff.use_fused_experts(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)))
        with pytest.raises(TypeError, match="A Linear was given"):
            ff.use_fused_experts(torch.nn.Linear(2, 2))

    def test_models_that_transformers_does_not_switch(self, tiny: Any) -> None:
        model = tiny("qwen3_moe", torch.float32)
        model.__class__ = type("Own", (type(model),), {"_can_set_experts_implementation_cached_value": False})
        with pytest.raises(ff.UsageError, match="does not let Own choose"):
            ff.use_fused_experts(model)
