"""Generation with converted models: caches, padding, images."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import farskip_fused as ff
from tests.conversion.conftest import families, layers_of

# Their attention is a recurrence or reads an index of the cache: transformers has no static cache for it.
DYNAMIC_ONLY = {
    "axk2", "bailing_hybrid", "deepseek_v32", "dots3_note", "dots3_note_text", "granitemoehybrid", "jamba",
    "kimi_linear", "minimax_m3_vl", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next",
}  # fmt: skip
NEW_TOKENS = 9
FAST = ["deepseek_v3", "qwen3_moe", "gpt_oss", "qwen3_next"]


def generate(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0} | options
    count = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    return model.generate(tokens, **count, **options)[:, tokens.shape[1] :]


@pytest.mark.parametrize("connectivity", ["farskip", "attention_only"])
@pytest.mark.parametrize("family", families(FAST))
def test_cached_generation_equals_recomputation(family: str, connectivity: str, tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny(family, torch.float32), connectivity)
    stops = [model.generation_config.eos_token_id]
    sequence = tokens
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = model(sequence, use_cache=False).logits[:, -1]
            logits[:, stops] = float("-inf")  # as min_new_tokens does
            sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(model, tokens, use_cache=True), sequence[:, tokens.shape[1] :])


@pytest.mark.parametrize("family", families(["deepseek_v3", "qwen3_moe"], without=DYNAMIC_ONLY))
def test_a_static_cache_generates_what_a_dynamic_one_does(family: str, tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny(family, torch.float32))
    static = generate(model, tokens, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, generate(model, tokens))


@pytest.mark.parametrize("family", families(FAST))
def test_left_padding_changes_nothing(family: str, tiny: Any, tokens: Any) -> None:
    model = ff.convert(tiny(family, torch.float32))
    short = tokens[:1, :6]
    padded = torch.cat([torch.zeros(1, 5, dtype=short.dtype), short], dim=1)
    batch, mask = torch.cat([padded, tokens[1:]]), torch.ones(2, 11, dtype=torch.long)
    mask[0, :5] = 0
    generated = generate(model, batch, attention_mask=mask)
    assert torch.equal(generated[:1], generate(model, short))
    assert torch.equal(generated[1:], generate(model, tokens[1:]))


def test_what_is_seen_in_images_is_added_to_both_streams(tiny: Any, tokens: Any) -> None:
    """Qwen3-VL adds image features to the outputs of its first layers."""
    stock = tiny("qwen3_vl_moe")
    converted = ff.convert(copy.deepcopy(stock), "standard")
    where = torch.zeros(2, 11, dtype=torch.bool)
    where[0, 2:5] = True
    seen = torch.randn(3, 32, dtype=torch.float64)

    def logits(model: Any) -> torch.Tensor:
        text = model.model.language_model
        embedded = text.embed_tokens(tokens)
        with torch.no_grad():
            states = text(inputs_embeds=embedded, visual_pos_masks=where, deepstack_visual_embeds=[seen])
        return states.last_hidden_state

    assert torch.equal(logits(converted), logits(stock))
    ff.convert(converted)
    received: list[Any] = []
    layers_of(converted)[1].register_forward_pre_hook(lambda _, arguments: received.append(arguments[0]))
    returned: list[Any] = []
    layers_of(converted)[0].register_forward_hook(lambda *arguments: returned.append(arguments[2]))
    logits(converted)
    for before, after in zip(returned[0].sums, received[0].sums, strict=True):
        assert torch.equal(after - before != 0, where[..., None].expand_as(before))
        torch.testing.assert_close(after[where], before[where] + seen)
    ff.revert(converted)
    assert type(converted.model.language_model) is type(stock.model.language_model)
