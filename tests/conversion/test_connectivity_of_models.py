"""A converted model computes what the paper defines, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import farskip_fused as ff
from farskip_fused import conversion
from tests.conversion.conftest import families, layers_of, logits_after, mlp_of, what_layers_receive

PARTIAL_ATTENTION = {"farskip", "attention_only"}
OUTDATED_MLP = {"farskip", "moe_only"}
LAYERS = {"all": range(5), "2:4": range(2, 4), "last:50%": range(3, 5), "first:1": range(1), "1:2": range(1, 2)}


def reads(connectivity: str, layers: str) -> tuple[set[int], set[int]]:
    chosen = set(LAYERS[layers])
    return (chosen if connectivity in PARTIAL_ATTENTION else set()), (chosen if connectivity in OUTDATED_MLP else set())


@pytest.mark.parametrize("family", families())
def test_every_family_equals_the_paper(family: str, tiny: Any, tokens: Any, paper: Any) -> None:
    stock = tiny(family)
    converted = copy.deepcopy(stock)
    assert any(hasattr(mlp_of(layer), "experts") for layer in layers_of(stock))
    for connectivity in ("farskip", "attention_only", "moe_only", "standard"):
        ff.convert(converted, connectivity)
        with torch.no_grad():
            expected, states = paper(stock, tokens, *reads(connectivity, "all"))
            found = converted(tokens, use_cache=False, output_hidden_states=True)
        assert (found.logits - expected).abs().max() == 0.0, connectivity
        assert len(found.hidden_states) == len(states) + 1
        for state, reference in zip(found.hidden_states[1:-1], states, strict=False):
            assert (state - reference).abs().max() == 0.0, connectivity


# The fast ones have a dense first layer and shared experts, dense layers between, and neither.
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("connectivity", ["farskip", "attention_only", "moe_only"])
@pytest.mark.parametrize("family", families(["deepseek_v3", "qwen2_moe", "qwen3_moe"]))
def test_some_layers_equal_the_paper(
    family: str, connectivity: str, layers: str, tiny: Any, tokens: Any, paper: Any
) -> None:
    stock = tiny(family)
    converted = ff.convert(copy.deepcopy(stock), connectivity, layers)
    with torch.no_grad():
        expected, _ = paper(stock, tokens, *reads(connectivity, layers))
        assert (converted(tokens, use_cache=False).logits - expected).abs().max() == 0.0


@pytest.mark.parametrize("dense", [0, 3])
def test_dense_first_layers(dense: int, tiny: Any, tokens: Any, paper: Any) -> None:
    stock = tiny("deepseek_v3", first_k_dense_replace=dense)
    converted = ff.convert(copy.deepcopy(stock))
    with torch.no_grad():
        expected, _ = paper(stock, tokens, *reads("farskip", "all"))
        assert (converted(tokens).logits - expected).abs().max() == 0.0


def test_moe_blocks_of_a_family_with_shared_experts_may_have_none(tiny: Any, tokens: Any, paper: Any) -> None:
    stock = tiny("ernie4_5_moe", moe_num_shared_experts=0)
    converted = ff.convert(copy.deepcopy(stock))
    with torch.no_grad():
        expected, _ = paper(stock, tokens, *reads("farskip", "all"))
        assert (converted(tokens).logits - expected).abs().max() == 0.0


@pytest.mark.parametrize("connectivity", ["farskip", "attention_only", "moe_only"])
def test_each_connectivity_differs_from_the_stock_model(connectivity: str, tiny: Any, tokens: Any) -> None:
    stock = tiny("deepseek_v3")
    converted = ff.convert(copy.deepcopy(stock), connectivity)
    with torch.no_grad():
        assert (converted(tokens).logits - stock(tokens).logits).abs().max() > 1e-2


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "mixtral"])
def test_standard_connectivity_is_bit_equal_to_stock(
    family: str, dtype: torch.dtype, experts: str, tiny: Any, tokens: Any
) -> None:
    stock = copy.deepcopy(tiny(family, dtype, experts_implementation=experts))
    converted = ff.convert(copy.deepcopy(stock), "standard")
    expected, found = stock(tokens, labels=tokens), converted(tokens, labels=tokens)
    assert (found.logits - expected.logits).abs().max() == 0.0
    assert found.loss == expected.loss
    if family != "mixtral":  # shared experts add their share to the gradient of what they read at another point
        return
    expected.loss.backward()
    found.loss.backward()
    for (name, ours), theirs in zip(converted.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_hidden_states_are_the_full_stream(tiny: Any, tokens: Any, paper: Any) -> None:
    stock = tiny("deepseek_v3")
    converted = ff.convert(copy.deepcopy(stock))
    with torch.no_grad():
        found = converted(tokens, output_hidden_states=True).hidden_states
        _, o = paper(stock, tokens, *reads("farskip", "all"))
        expected = [stock.model.embed_tokens(tokens), *o[:-1], stock.model.norm(o[-1])]
    assert len(found) == len(expected)
    for state, reference in zip(found, expected, strict=True):
        assert (state - reference).abs().max() == 0.0


@pytest.mark.parametrize("connectivity", ["farskip", "attention_only"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_cached_generation_equals_recomputation(family: str, connectivity: str, tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny(family, torch.float32), connectivity)
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    cached = model.generate(tokens, use_cache=True, **options)
    sequence = tokens
    with torch.no_grad():
        for _ in range(9):
            logits = model(sequence, use_cache=False).logits[:, -1]
            logits[:, model.config.eos_token_id] = float("-inf")  # as min_new_tokens does
            sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, sequence)


@pytest.mark.parametrize("connectivity", ["farskip", "attention_only", "moe_only", "standard"])
def test_gradients_equal_those_of_the_paper(connectivity: str, tiny: Any, tokens: Any, paper: Any) -> None:
    stock = tiny("deepseek_v3")
    converted = ff.convert(copy.deepcopy(stock), connectivity)
    weights = torch.randn(2, 11, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # Shared experts come from copies in the reference, whose gradients are lost: so look at the attention's only.
    names = [name for name, _ in stock.named_parameters() if "self_attn" in name]
    assert names
    (paper(stock, tokens, *reads(connectivity, "all"))[0] * weights).sum().backward()
    (converted(tokens).logits * weights).sum().backward()
    found = dict(converted.named_parameters())
    for name in names:
        expected = stock.get_parameter(name).grad
        torch.testing.assert_close(found[name].grad, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("depth", [2, 3])
def test_deeper_layers_read_what_is_defined(depth: int, tiny: Any, tokens: Any) -> None:
    stock = tiny("deepseek_v3")
    converted = ff.convert(copy.deepcopy(stock), ff.Connectivity.farskip(depth))
    with torch.no_grad():
        embedding, arguments = what_layers_receive(stock, tokens)
        early, late = embedding, []  # attention and shared experts, which everybody reads, and routed experts
        for k, layer in enumerate(layers_of(stock)):
            attention_input, mlp_input = (early + sum(late[: max(0, k - lacks)]) for lacks in (depth, depth - 1))
            attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(attention_input), **arguments[k])
            normed = layer.post_attention_layernorm(mlp_input)
            output = layer.mlp(normed)
            shared = layer.mlp.shared_experts(normed) if hasattr(layer.mlp, "experts") else output
            early, late = early + attended + shared, [*late, output - shared]
        expected = logits_after(stock, tokens, early + sum(late))
        torch.testing.assert_close(converted(tokens, use_cache=False).logits, expected, rtol=1e-9, atol=1e-9)
        assert (ff.convert(converted)(tokens, use_cache=False).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_activation_checkpointing_leaves_gradients_as_they_are(family: str, tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny(family, torch.float32)).train()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert len(calls) == 2, "the layer must run again in the backward pass"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_reentrant_activation_checkpointing_is_refused(tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny("qwen3_moe", torch.float32)).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ff.UsageError, match='"use_reentrant": False'):
        model(tokens, labels=tokens, use_cache=False)


def test_router_jitter_of_mixtral_is_that_of_stock(tiny: Any, tokens: Any) -> None:
    stock = tiny("mixtral", torch.float32, router_jitter_noise=0.3).train()
    converted = ff.convert(copy.deepcopy(stock), "standard")
    torch.manual_seed(3)
    expected = stock(tokens).logits
    torch.manual_seed(3)
    assert torch.equal(converted(tokens).logits, expected)
    assert not torch.equal(converted(tokens).logits, expected)


def test_experts_are_called_with_flat_tokens_indices_and_weights(tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny("deepseek_v3", torch.float32))
    expected = model(tokens).logits
    seen = []

    class Recorder(torch.nn.Module):
        def __init__(self, experts: Any) -> None:
            super().__init__()
            self.inner = experts

        def forward(self, hidden: Any, indices: Any, weights: Any) -> Any:
            seen.append((hidden.shape, indices.shape, weights.shape, indices.dtype))
            return self.inner(hidden, indices, weights)

    blocks = conversion.moe_blocks(model)
    assert [name for name, _ in blocks] == [f"model.layers.{index}.mlp" for index in range(1, 5)]
    for _, block in blocks:
        block.experts = Recorder(block.experts)  # type: ignore[assignment]
    assert torch.equal(model(tokens).logits, expected)
    assert seen == [((22, 32), (22, 3), (22, 3), torch.int64)] * 4
    assert [name for name, _ in conversion.moe_blocks(model)] == [name for name, _ in blocks]
