"""Chats, prompts and text from JSONL and Parquet, packed into blocks in which documents do not see each other."""

from __future__ import annotations

import json

import pytest
import torch

import farskip_fused as ff
from farskip_fused.distillation import Blocks, evaluate, train_tokenizer
from farskip_fused.distillation.data import Document, as_blocks
from farskip_fused.distillation.forward import hidden_states
from farskip_fused.distillation.packing import Encoded, pack, stream
from farskip_fused.errors import UsageError

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer([Document("text", "one two three four assistant user end", "0")], 270)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def counted_text(blocks, tokenizer):
    return tokenizer.decode(blocks.ids[blocks.counted])


def test_of_a_chat_the_answers_count_and_what_ends_them(tmp_path, tokenizer):
    file = write(tmp_path / "chat.jsonl", {"messages": CHAT})
    blocks = as_blocks(file, 64, tokenizer)
    text = tokenizer.decode(blocks.ids[0])
    assert text.startswith("<user>one<assistant>two<end><user>three<assistant>four<end>")
    assert counted_text(blocks, tokenizer) == "two<end>four<end>"
    whole = as_blocks(file, 64, tokenizer, answers_only=False)
    assert counted_text(whole, tokenizer) == text.removeprefix("<").partition(tokenizer.eos_token)[0], (
        "all but the first"
    )


def test_prompts_and_plain_text_are_records_too(tmp_path, tokenizer):
    file = write(tmp_path / "data.jsonl", {"prompt": "one", "completion": " two"}, {"text": "three"})
    blocks = as_blocks(file, 64, tokenizer)
    end = tokenizer.eos_token
    assert tokenizer.decode(blocks.ids[0]).startswith(f"{end}one two{end}{end}three{end}")
    assert counted_text(blocks, tokenizer) == f" two{end}three{end}"


def test_parquet_holds_the_same_records_as_jsonl(tmp_path, tokenizer):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    records = [{"messages": CHAT, "score": 1.0}, {"messages": CHAT[:2], "score": 2.0}]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "chat.parquet")
    write(tmp_path / "chat.jsonl", *records)
    found, expected = (as_blocks(tmp_path / name, 48, tokenizer) for name in ("chat.parquet", "chat.jsonl"))
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.counted, expected.counted)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "line 1, is not JSON"),
        ("[]", "line 1, is not an object"),
        ('{"question": "?"}', "line 1: a record needs"),
        ('{"messages": [{"role": "user"}]}', "line 1: a record needs"),
        ('{"messages": [{"role": "user", "content": "one"}]}', "no message of the assistant"),
    ],
)
def test_wrong_records_are_named(tmp_path, tokenizer, line, part):
    (tmp_path / "data.jsonl").write_text(line + "\n")
    with pytest.raises(UsageError, match=part):
        as_blocks(tmp_path / "data.jsonl", 16, tokenizer)


def test_records_and_text_are_not_mixed_and_chats_need_a_template(tmp_path, tokenizer):
    write(tmp_path / "chat.jsonl", {"messages": CHAT})
    (tmp_path / "readme.txt").write_text("one")
    with pytest.raises(UsageError, match="give one kind"):
        as_blocks(tmp_path, 16, tokenizer)
    plain = train_tokenizer([Document("text", "one", "0")], 258)
    with pytest.raises(UsageError, match="no chat template"):
        as_blocks(tmp_path / "chat.jsonl", 16, plain)
    with pytest.raises(UsageError, match="there is no answer"):
        as_blocks(tmp_path / "chat.jsonl", 4, tokenizer)


def documents(*lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    drawn = [torch.randint(1, 64, (length,), generator=generator).tolist() for length in lengths]
    return [Encoded(ids, [True] * len(ids)) for ids in drawn]


def test_packing_keeps_documents_whole_and_pads():
    given = documents(5, 9, 3, 7, 20)
    blocks = pack(given, 12, padding=0)
    first, second, third = (each.ids for each in (given[0], given[2], given[1]))
    assert blocks.ids.tolist()[:2] == [[*first, *second, 0, 0, 0, 0], [*third, 0, 0, 0]]
    assert blocks.ids.tolist()[2:] == [[*given[3].ids, 0, 0, 0, 0, 0], given[4].ids[:12]]
    assert blocks.positions[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]
    assert blocks.counted[0].tolist() == [False, True, True, True, True, False, True, True] + 4 * [False]
    assert blocks.predictions() == 4 + 8 + 2 + 6 + 11


def test_a_stream_is_cut_at_blocks_and_restarts_there():
    blocks = stream(documents(5, 9, 4), 6)
    assert blocks.positions.tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]]
    assert (blocks.counted == (blocks.positions > 0)).all()


def test_packed_documents_are_as_if_each_were_alone(build):
    """States and evaluation, of a converted model."""
    model = ff.convert(build())
    given = documents(5, 6, 7)
    packed = pack(given, 20, padding=0)
    assert len(packed) == 1
    alone = [Blocks(torch.tensor([each.ids])) for each in given]
    with torch.no_grad():
        expected = torch.cat([hidden_states(model, each) for each in alone])
        torch.testing.assert_close(hidden_states(model, packed), expected, rtol=1e-4, atol=1e-5)
    weights = [each.predictions() for each in alone]
    means = [evaluate(model, each).val_ce for each in alone]
    expected = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    assert evaluate(model, packed).val_ce == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("from_rows", [1, 2])
def test_a_model_that_mixes_packed_documents_is_refused(build, from_rows):
    """Also one that mixes them in batches of more than one row only, as flash attention does."""
    model = build()

    def mix(_module, _arguments, given):
        return (), given | ({"position_ids": None} if len(given["input_ids"]) >= from_rows else {})

    model.model.register_forward_pre_hook(mix, with_kwargs=True)
    with pytest.raises(UsageError, match="cannot keep packed documents apart"):
        evaluate(model, pack(documents(5, 6), 12, padding=0))
