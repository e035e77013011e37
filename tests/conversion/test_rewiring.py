"""Converting in place: what changes, what stays, what is refused."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import farskip_fused as ff
from farskip_fused import conversion

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def names(model: Any) -> list[str]:
    return [connectivity.name for connectivity in conversion.connectivity_of(model)]


def test_parameters_keep_their_names_order_and_storage(tiny: Any) -> None:
    model = tiny("deepseek_v3")
    before = [(name, parameter) for name, parameter in model.named_parameters()]
    buffers = [name for name, _ in model.named_buffers()]
    keys = list(model.state_dict())
    assert ff.convert(model) is model
    after = list(model.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(new is old for (_, new), (_, old) in zip(after, before, strict=True))
    assert [name for name, _ in model.named_buffers()] == buffers
    assert list(model.state_dict()) == keys


def test_decoder_layers_keep_the_class_name_that_wrappers_look_for(tiny: Any) -> None:
    model = ff.convert(tiny("qwen3_moe"))
    assert {type(layer).__name__ for layer in model.model.layers} == set(model._no_split_modules)


def test_converting_again_counts_alone(tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny("qwen3_moe"), layers="first:4")
    assert names(model) == ["farskip"] * 4 + ["standard"]
    ff.convert(model, "moe_only", [1, 4])
    assert names(model) == ["standard", "moe_only", "standard", "standard", "moe_only"]
    fresh = ff.convert(tiny("qwen3_moe"), ff.Connectivity.moe_only(), [4, 1])
    assert torch.equal(model(tokens).logits, fresh(tokens).logits)
    assert model.config.farskip == fresh.config.farskip


def test_a_stock_model_has_standard_connectivity(tiny: Any) -> None:
    assert names(tiny("olmoe")) == ["standard"] * 5


def test_teacher_is_stock_and_restored_after_an_error(tiny: Any, tokens: Any) -> None:
    stock = tiny("deepseek_v3", torch.float32)
    model = ff.convert(copy.deepcopy(stock), "attention_only", "last:2")
    student = model(tokens).logits
    with pytest.raises(KeyError), conversion.as_teacher(model) as teacher:
        assert teacher is model
        assert names(model) == ["standard"] * 5
        assert torch.equal(model(tokens).logits, stock(tokens).logits)
        raise KeyError
    assert names(model) == ["standard"] * 3 + ["attention_only"] * 2
    assert torch.equal(model(tokens).logits, student)


def test_teacher_looks_into_wrapped_models(tiny: Any) -> None:
    wrapped = torch.nn.Sequential(ff.convert(tiny("mixtral")))
    with conversion.as_teacher(wrapped):
        assert names(wrapped) == ["standard"] * 5
    assert names(wrapped) == ["farskip"] * 5


def test_teacher_of_a_stock_model_is_refused(tiny: Any) -> None:
    with pytest.raises(ff.UsageError, match="convert the model first"), conversion.as_teacher(tiny("mixtral")):
        pass


@pytest.mark.parametrize("family", ["deepseek_v3", "hunyuan_v1_moe"])
def test_revert_gives_back_the_stock_model(family: str, tiny: Any, tokens: Any) -> None:
    stock = tiny(family)
    model = copy.deepcopy(stock)
    assert ff.revert(ff.convert(model)) is model
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
    assert [vars(module).keys() for module in model.modules()] == [vars(module).keys() for module in stock.modules()]
    assert type(model.config) is type(stock.config)
    assert model.config.to_dict() == stock.config.to_dict()
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))
    assert torch.equal(model(tokens).logits, stock(tokens).logits)
    assert ff.revert(model) is model


def test_models_built_from_one_configuration_stay_apart(tiny: Any) -> None:
    teacher = tiny("qwen3_moe")
    student = type(teacher)(teacher.config)
    ff.convert(student)
    assert student.config.model_type == "farskip_qwen3_moe"
    assert all(module.config is student.config for module in student.modules() if hasattr(module, "config"))
    assert teacher.config.model_type == "qwen3_moe"
    assert not hasattr(teacher.config, "farskip")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_converted_models_can_be_copied_and_pickled(duplicate: Any, tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny("deepseek_v3"), "farskip", "last:3")
    twin = duplicate(model)
    assert type(twin) is type(model)
    assert torch.equal(twin(tokens).logits, model(tokens).logits)
    ff.convert(twin, "standard")
    assert names(model) == ["standard"] * 2 + ["farskip"] * 3
    assert twin.config.farskip != model.config.farskip
    ff.revert(twin)


def test_a_state_dict_fits_stock_and_converted(tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny("deepseek_v3"))
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    other = tiny("deepseek_v3", initializer_range=0.1)
    other.load_state_dict(torch.load(saved))
    assert torch.equal(ff.convert(other)(tokens).logits, model(tokens).logits)


def test_the_experts_implementation_can_be_switched(tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny("deepseek_v3", torch.float32))
    eager = model(tokens).logits
    model.set_experts_implementation("grouped_mm")
    torch.testing.assert_close(model(tokens).logits, eager)
    assert all(layer.mlp.experts.config._experts_implementation == "grouped_mm" for layer in model.model.layers[1:])


def test_a_family_without_experts_is_refused() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    with pytest.raises(ff.UsageError, match="LlamaForCausalLM has no MoE layer"):
        ff.convert(model)


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), "deepseek", None])
def test_what_is_no_transformers_model_is_a_type_error(thing: Any) -> None:
    with pytest.raises(TypeError, match="give the transformers model itself"):
        ff.convert(thing)


def test_a_bare_decoder_is_refused(tiny: Any) -> None:
    with pytest.raises(ff.UsageError, match="only the whole model, Qwen3MoeForCausalLM"):
        ff.convert(tiny("qwen3_moe").model)


def test_a_model_without_moe_layers_is_refused() -> None:
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL, mlp_only_layers=[0, 1]))
    with pytest.raises(ff.UsageError, match="no MoE layer"):
        ff.convert(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sideways",), "Unknown connectivity 'sideways'"),
        (("farskip", "some"), "Unknown layers expression 'some'"),
        (("farskip", "3:9"), "outside the model's 5 layers"),
        (("farskip", []), "no layer is selected"),
    ],
)
def test_wrong_arguments_leave_the_model_as_it_is(arguments: Any, message: str, tiny: Any) -> None:
    model = tiny("qwen3_moe")
    with pytest.raises(ff.UsageError, match=message):
        ff.convert(model, *arguments)
    assert type(model) is transformers.Qwen3MoeForCausalLM
    assert model.config.model_type == "qwen3_moe"
    ff.convert(model, "moe_only")
    with pytest.raises(ff.UsageError, match=message):
        ff.convert(model, *arguments)
    assert names(model) == ["moe_only"] * 5


def test_layers_with_further_parts_are_refused(tiny: Any) -> None:
    model = tiny("qwen3_moe")
    model.model.layers[2].pre_feedforward_layernorm = torch.nn.Identity()
    with pytest.raises(ff.UsageError, match=r"Layer 2 .*it differs in pre_feedforward_layernorm"):
        ff.convert(model)
    assert type(model) is transformers.Qwen3MoeForCausalLM


def test_layers_with_another_forward_are_refused(tiny: Any) -> None:
    model = tiny("qwen3_moe")
    stock = type(model.model.layers[0])

    class PostNormLayer(stock):  # type: ignore[valid-type, misc]
        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            residual = hidden_states
            hidden_states, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
            hidden_states = residual + self.input_layernorm(hidden_states)
            return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))

    PostNormLayer.__module__ = stock.__module__
    model.model.layers[4].__class__ = PostNormLayer
    with pytest.raises(ff.UsageError, match=r"Layer 4 .*does not compute what a stock pre-norm layer does"):
        ff.convert(model)
    assert type(model.model.layers[0]) is stock


def test_layers_that_change_what_attention_receives_are_refused(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the source does not show, the check of converted layers does."""
    model = tiny("deepseek_v3", torch.float32)
    stock = type(model.model.layers[0])
    plain = stock.forward

    @functools.wraps(plain)
    def without_mask(self: Any, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return plain(self, hidden_states, attention_mask=None, **kwargs)

    monkeypatch.setattr(stock, "forward", without_mask)
    with pytest.raises(ff.UsageError, match="would compute something else than stock"):
        ff.convert(model)
    assert type(model) is transformers.DeepseekV3ForCausalLM
    assert type(model.model.layers[0]) is stock
    assert model.config.model_type == "deepseek_v3"


def test_blocks_that_compute_something_else_are_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("deepseek_v3", torch.float32)
    block = type(model.model.layers[1].mlp)
    plain = block.forward
    monkeypatch.setattr(block, "forward", functools.wraps(plain)(lambda self, x: 1.5 * plain(self, x)))
    with pytest.raises(ff.UsageError, match="would compute something else than stock"):
        ff.convert(model)
    assert type(model) is transformers.DeepseekV3ForCausalLM


def test_blocks_with_other_parts_are_refused(tiny: Any) -> None:
    model = tiny("deepseek_v3")
    model.model.layers[3].mlp.latent = torch.nn.Linear(2, 2)
    with pytest.raises(ff.UsageError, match=r"Layer 3 .*does not split into routed and shared experts: see latent"):
        ff.convert(model)


def test_decoders_that_change_hidden_states_between_layers_are_refused(tiny: Any) -> None:
    model = tiny("qwen3_moe")

    class Clamping(type(model.model)):  # type: ignore[misc]
        def forward(self, hidden_states: Any) -> Any:
            for layer in self.layers:
                hidden_states = layer(hidden_states)
                hidden_states = hidden_states.clamp(-1, 1)
            return hidden_states

    model.model.__class__ = Clamping
    with pytest.raises(ff.UsageError, match="Clamping does more between its layers than pass on hidden states"):
        ff.convert(model)


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "axk1": ("AXK1DecoderLayer.*see post_mlp_layernorm", {}),
    "glm_moe_dsa": ("GlmMoeDsaDecoderLayer.*does not compute what a stock pre-norm layer does", {}),
    "flex_olmo": ("FlexOlmoDecoderLayer.*does not compute what a stock pre-norm layer does", {"pad_token_id": 0}),
    "afmoe": ("AfmoeDecoderLayer.*does not compute what a stock pre-norm layer does", {"num_dense_layers": 0}),
    "lfm2_moe": (
        "Lfm2MoeDecoderLayer.*does not compute what a stock pre-norm layer does",
        {"num_dense_layers": 0, "layer_types": ["conv", "full_attention"]},
    ),
    "hy_v3": ("HYV3DecoderLayer.*set enable_moe_fp32_combine to False", {"enable_moe_fp32_combine": True}),
}


@pytest.mark.parametrize("family", REFUSED)
def test_other_skeletons_are_refused_with_the_reason(family: str) -> None:
    message, settings = REFUSED[family]
    config = transformers.AutoConfig.for_model(family, **(SMALL | {"first_k_dense_replace": 0} | settings))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ff.UsageError, match=message):
        ff.convert(model)


def test_pipeline_stages_are_refused(tiny: Any, tokens: Any, tmp_path: Path) -> None:
    model = ff.convert(tiny("qwen3_moe"))
    assert not model.supports_pp_plan
    with pytest.raises(ff.UsageError, match="given one tensor instead of streams; pipeline stages"):
        model.model.layers[2](torch.zeros(1, 3, 32, dtype=torch.float64))
    model.save_pretrained(tmp_path)
    with pytest.raises(ff.UsageError, match="pp_size is 2, but pipeline stages pass on one tensor"):
        ff.load(tmp_path, distributed_config={"pp_size": 2})
    stage = tiny("qwen3_moe")
    stage._pp_stage = object()
    with pytest.raises(ff.UsageError, match="one stage of a pipeline"):
        ff.convert(stage)


def test_unlisted_types_convert_and_load_too(tiny: Any, tokens: Any, tmp_path: Path) -> None:
    config = type("OwnConfig", (transformers.Qwen3MoeConfig,), {"model_type": "own_moe"})
    own = type("OwnForCausalLM", (transformers.Qwen3MoeForCausalLM,), {"config_class": config})
    transformers.AutoConfig.register("own_moe", config)
    transformers.AutoModelForCausalLM.register(config, own)
    model = ff.convert(own(config(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)).eval())
    model.save_pretrained(tmp_path, save_original_format=False)
    assert torch.equal(ff.load(tmp_path)(tokens).logits, model(tokens).logits)


def test_revert_refuses_what_was_wrapped_after_converting(tiny: Any) -> None:
    model = ff.convert(tiny("qwen3_moe"))
    converted = type(model.model.layers[1])
    model.model.layers[1].__class__ = type("Wrapped", (converted,), {})
    with pytest.raises(ff.UsageError, match="class Wrapped, put on it after convert"):
        ff.revert(model)
    assert type(model.model.layers[0]) is converted


def test_a_converted_configuration_without_moe_layers_builds_no_model() -> None:
    config = ff.convert(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL))).config
    config.mlp_only_layers = [0, 1]
    with pytest.raises(ff.UsageError, match="no MoE layer"):
        transformers.AutoModelForCausalLM.from_config(config)
