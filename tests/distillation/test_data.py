"""Documents, their split and the blocks made of them."""

from __future__ import annotations

import hashlib

import pytest
import torch

from farskip_fused.distillation.data import (
    as_blocks,
    read_documents,
    split,
    standard_library,
    token_blocks,
    train_tokenizer,
)
from farskip_fused.errors import UsageError


@pytest.fixture
def library(tmp_path):
    """A directory of texts with a duplicate, a binary file, an empty one, hidden ones and tests."""
    for name, content in {
        "b.py": b"two = 2\n",
        "a.py": b"one = 1\n",
        "package/c.py": b"three = 3\n",
        "package/copy_of_a.py": b"one = 1\n",
        "package/notes.txt": b"four\n",
        "package/binary.py": b"\xff\xfe\x00",
        "package/empty.py": b"",
        "package/.hidden.py": b"five = 5\n",
        ".git/d.py": b"six = 6\n",
        "test/e.py": b"seven = 7\n",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path


@pytest.fixture(scope="module")
def documents():
    return standard_library()


def test_documents_are_sorted_distinct_text(library):
    documents = read_documents(library, "*.py", skip=["test"])
    assert [document.text for document in documents] == ["one = 1\n", "two = 2\n", "three = 3\n"]
    assert documents[0].digest == hashlib.sha256(b"one = 1\n").hexdigest()


def test_all_files_of_a_directory_or_one_file(library):
    assert len(read_documents(library)) == 5
    assert [document.text for document in read_documents(library / "b.py")] == ["two = 2\n"]


def test_no_text_is_refused(library, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no UTF-8 text"):
        read_documents(library / "package" / "binary.py")


def test_the_standard_library_is_real_text_without_tests(documents):
    names = [document.name for document in documents]
    assert sum(len(document.text) for document in documents) > 4_000_000
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any("/test/" in name or "/site-packages/" in name for name in names)
    assert len({document.digest for document in documents}) == len(documents)


def test_a_split_is_disjoint_complete_and_depends_on_content_alone(documents):
    training, validation = split(documents, 0.1)
    assert {each.digest for each in training}.isdisjoint(each.digest for each in validation)
    assert len(training) + len(validation) == len(documents)
    assert 0.05 < len(validation) / len(documents) < 0.2
    fewer = documents[::2]
    assert split(fewer, 0.1)[1] == [each for each in validation if each in fewer]
    assert set(split(documents, 0.05)[1]) <= set(validation)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_outside_zero_to_one_is_refused(documents, share):
    with pytest.raises(UsageError, match="between 0 and 1"):
        split(documents, share)


def test_a_split_with_an_empty_side_is_refused(documents):
    with pytest.raises(UsageError, match="do not split"):
        split(documents[:1])


def test_blocks_hold_the_documents_each_after_an_end_of_text(library):
    documents = read_documents(library)
    tokenizer = train_tokenizer(documents, 270)
    blocks = token_blocks(documents, tokenizer, 4)
    assert blocks.shape[1] == 4
    assert blocks.dtype == torch.int64
    text = "".join(tokenizer.eos_token + document.text for document in documents)
    decoded = tokenizer.decode(blocks.flatten())
    assert text.startswith(decoded)
    assert len(tokenizer(text)["input_ids"]) - blocks.numel() < 4


def test_a_tokenizer_is_the_same_for_the_same_text_and_keeps_every_byte(documents):
    first, second = (train_tokenizer(documents[:20], 400) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 400
    text = "def f(x):\n\treturn  'zażółć'  # \U0001f600\r\n"
    assert first.decode(first(text)["input_ids"]) == text


def test_a_vocabulary_without_room_for_the_bytes_is_refused(library):
    with pytest.raises(UsageError, match="more than 256"):
        train_tokenizer(read_documents(library), 200)


@pytest.mark.parametrize("data", [list(range(10)), range(10), torch.arange(10), torch.arange(10, dtype=torch.int32)])
def test_ids_are_cut_into_blocks(data):
    blocks = as_blocks(data, 4)
    assert blocks.ids.dtype == torch.int64
    assert blocks.ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert blocks.positions is blocks.counted is None


def test_blocks_are_taken_as_they_are():
    given = torch.arange(12).view(4, 3)
    assert torch.equal(as_blocks(given, 8).ids, given)


def test_a_path_is_read_with_the_tokenizer(library):
    documents = read_documents(library)
    tokenizer = train_tokenizer(documents, 270)
    blocks = as_blocks(library, 4, tokenizer)
    ended = [id for each in documents for id in (0, *tokenizer(each.text)["input_ids"], 0)]
    assert blocks.ids.flatten().tolist() == ended[: blocks.numel()]
    with pytest.raises(UsageError, match="needs a tokenizer"):
        as_blocks(str(library), 4)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (torch.arange(3), UsageError),
        (torch.zeros(2, 2, 2, dtype=torch.int64), UsageError),
        (torch.zeros(4, 1, dtype=torch.int64), UsageError),
        (torch.rand(16), TypeError),
        (["words"], TypeError),
        (7, TypeError),
    ],
)
def test_what_is_no_data_is_refused(data, error):
    with pytest.raises(error):
        as_blocks(data, 4)


def test_blocks_of_one_token_are_refused():
    with pytest.raises(UsageError, match="2 are needed"):
        as_blocks(range(10), 1)
