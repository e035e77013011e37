"""Llama-4, whose router scores multiply the input of its experts: transformers' own sums, and the kernels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import farskip_fused as ff
from farskip_fused.conversion.llama4 import Llama4Experts
from farskip_fused.distillation.blocks import Blocks
from farskip_fused.distillation.forward import hidden_states
from tests.conversion.test_experts_implementation import check_equal_to_eager, outcome
from tests.numerics import DEVICE, assert_close

CLASSES = ["llama4", "llama4_text"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", CLASSES)
def test_standard_connectivity_is_bit_equal_to_stock(family: str, dtype: torch.dtype, tiny: Any, tokens: Any) -> None:
    stock = tiny(family, dtype)
    converted = ff.convert(copy.deepcopy(stock), "standard")
    gradient = torch.randn(*tokens.shape, 61).to(dtype)
    expected, expected_gradients = outcome(stock, tokens, gradient)
    logits, gradients = outcome(converted, tokens, gradient)
    assert torch.equal(logits, expected)
    assert gradients.keys() == expected_gradients.keys()
    if dtype == torch.float32:  # the stock block adds up the scores' gradients in bfloat16
        for name, value in gradients.items():
            assert_close(value, expected_gradients[name], dtype)


@pytest.mark.parametrize("connectivity", ["farskip", "standard"])
@pytest.mark.parametrize(("family", "top_k"), [("llama4", 1), ("llama4_text", 1), ("llama4_text", 3)])
def test_a_converted_model_runs_on_the_kernels(
    family: str, top_k: int, connectivity: str, tiny: Any, tokens: Any
) -> None:
    model = tiny(family, torch.float32, num_experts_per_tok=top_k, num_hidden_layers=2, moe_layers=[1])
    check_equal_to_eager(ff.convert(model.to(DEVICE), connectivity), tokens)


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_kernels_compute_what_the_stock_model_computes(top_k: int, tiny: Any, tokens: Any) -> None:
    stock = tiny("llama4_text", torch.float32, num_experts_per_tok=top_k, num_hidden_layers=2).to(DEVICE)
    model = ff.use_fused_experts(ff.convert(copy.deepcopy(stock), "standard"))
    with torch.no_grad():
        assert_close(model(tokens.to(DEVICE)).logits, stock(tokens.to(DEVICE)).logits, torch.float32)


def test_transformers_other_implementations_serve_too(tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny("llama4_text", torch.float32))
    expected = model(tokens).logits
    model.set_experts_implementation("grouped_mm")
    assert_close(model(tokens).logits, expected, torch.float32)


@pytest.mark.parametrize("family", CLASSES)
def test_what_is_chosen_by_name_when_loaded(family: str, tiny: Any, tokens: Any, tmp_path: Any) -> None:
    model = ff.use_fused_experts(ff.convert(tiny(family, torch.float32).to(DEVICE)))
    model.save_pretrained(tmp_path)
    loaded = ff.load(tmp_path, experts_implementation="farskip").to(DEVICE)
    assert torch.equal(loaded(tokens.to(DEVICE)).logits, model(tokens.to(DEVICE)).logits)
    assert ff.load(tmp_path).config._experts_implementation == "eager", "on a CPU"


@pytest.mark.gpu
@pytest.mark.parametrize("family", CLASSES)
def test_on_a_gpu_converting_and_loading_choose_the_kernels(family: str, tiny: Any, tmp_path: Any) -> None:
    model = ff.convert(tiny(family, torch.bfloat16).cuda(), "standard")
    assert model.config._experts_implementation == "farskip"
    model.save_pretrained(tmp_path)
    assert ff.load(tmp_path, device_map="cuda").config._experts_implementation == "farskip"
    assert ff.convert(tiny(family).cuda()).config._experts_implementation == "eager", "no kernels of double precision"


@pytest.mark.parametrize("family", CLASSES)
def test_revert_gives_back_the_stock_experts(family: str, tiny: Any, tokens: Any) -> None:
    stock = tiny(family, torch.float32)
    model = ff.use_fused_experts(ff.convert(copy.deepcopy(stock)))
    assert any(isinstance(module, Llama4Experts) for module in model.modules())
    ff.revert(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
    assert [vars(module).keys() for module in model.modules()] == [vars(module).keys() for module in stock.modules()]
    assert model.config.to_dict() == stock.config.to_dict()
    text = getattr(model, "language_model", model)
    assert text.config is text.model.config
    assert torch.equal(model(tokens).logits, stock(tokens).logits)


def test_images_are_read_as_before(tiny: Any) -> None:
    stock = tiny("llama4", torch.float32)
    converted = ff.convert(copy.deepcopy(stock), "standard")
    pictures = torch.randn(1, 3, 8, 8)
    features = stock.get_image_features(pixel_values=pictures, vision_feature_select_strategy="default")
    features = features if isinstance(features, torch.Tensor) else features.last_hidden_state
    read = stock.multi_modal_projector(features.reshape(-1, features.shape[-1]))
    tokens = torch.tensor([[5] + [60] * read.shape[0] + [7, 8]])
    expected = stock(tokens, pixel_values=pictures).logits
    assert torch.equal(converted(tokens, pixel_values=pictures).logits, expected)
    assert not torch.equal(converted(tokens, pixel_values=-pictures).logits, expected)


def test_parallel_experts_of_several_a_token(tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny("llama4_text", torch.float32, num_experts_per_tok=3, num_hidden_layers=1).to(DEVICE))
    tokens = tokens.to(DEVICE)
    split = ff.parallelize(copy.deepcopy(model), ff.init(device=DEVICE), max_tokens=tokens.numel())
    with torch.no_grad():
        assert_close(split(tokens).logits, model(tokens).logits, torch.float32)
    with pytest.raises(ff.UsageError, match="experts were replaced after convert"):
        ff.revert(split)


@pytest.mark.parametrize("family", CLASSES)
def test_distillation_finds_its_final_hidden_states(family: str, tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny(family, torch.float32))
    with torch.no_grad():
        logits = model.get_output_embeddings()(hidden_states(model, Blocks(tokens)))
        assert_close(logits, model(tokens).logits[:, :-1].flatten(0, 1), torch.float32)


class TestRefused:
    def test_the_stock_model_has_no_choice_of_experts(self, tiny: Any) -> None:
        stock = tiny("llama4_text", torch.float32)
        with pytest.raises(ff.UsageError, match=r"Llama-4's must be converted first: ff\.convert"):
            ff.use_fused_experts(stock)
        with pytest.raises(ff.UsageError, match="Llama-4 must be converted first"):
            ff.parallelize(stock, ff.init(device=DEVICE))

    def test_another_activation(self, tiny: Any) -> None:
        model = ff.convert(tiny("llama4_text", torch.float32, hidden_act="gelu"))
        with pytest.raises(ff.UsageError, match="Llama4TextExperts has the activation GELUActivation"):
            ff.use_fused_experts(model)

    def test_experts_of_somebody_else(self, tiny: Any) -> None:
        model = tiny("llama4_text", torch.float32)
        block = model.model.layers[1].feed_forward
        block.experts = torch.nn.ModuleList()
        with pytest.raises(ff.UsageError, match=r"Layer 1 .*its experts are ModuleList, not Llama-4's own"):
            ff.convert(model)
        assert type(model) is transformers.Llama4ForCausalLM

    def test_the_language_model_of_another_class(self, tiny: Any) -> None:
        model = tiny("llama4", torch.float32)
        with pytest.raises(ff.UsageError, match="only the whole model, Llama4ForC"):
            ff.convert(model.language_model.model)
