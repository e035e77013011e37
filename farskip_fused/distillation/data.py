"""Text to blocks of token ids."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farskip_fused.distillation.blocks import Blocks
from farskip_fused.distillation.packing import Encoded, cut, pack, stream
from farskip_fused.distillation.records import SUFFIXES, encode, read_records
from farskip_fused.errors import UsageError

END_OF_TEXT = "<|endoftext|>"

# Tests, code that is generated or kept for another version of Python, packages that are not the library's, and tables
# of the character encodings: text that says little about how the library's Python is written.
_NOT_LIBRARY = ["__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3"]
_NOT_LIBRARY += ["pydoc_data", "site-packages", "test", "tests", "turtledemo"]


@dataclass(frozen=True)
class Document:
    """One text and the SHA-256 of its UTF-8 bytes, by which documents are de-duplicated and split."""

    name: str
    text: str
    digest: str


def read_documents(path: str | os.PathLike[str], pattern: str = "*", skip: Iterable[str] = ()) -> list[Document]:
    """The text of a file, or of a directory's files that match ``pattern``, sorted by path and without duplicates.

    skip: names of sub-directories that are left out, at any depth. Hidden files and directories and files that are not
    UTF-8 are left out too. Raises UsageError if nothing is left.
    """
    root = Path(path)
    found = _wanted_files(root, pattern, frozenset(skip))
    documents: dict[str, Document] = {}
    for file in found:
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if content and digest not in documents:
            try:
                documents[digest] = Document(str(file), content.decode("utf-8"), digest)
            except UnicodeDecodeError:
                continue
    if not documents:
        raise UsageError(f"{root} holds no UTF-8 text; give a text file or a directory of text files.")
    return list(documents.values())


def standard_library() -> list[Document]:
    """The Python source files of the running interpreter's standard library, without its tests."""
    return read_documents(sysconfig.get_path("stdlib"), "*.py", _NOT_LIBRARY)


def split(documents: Sequence[Document], validation_share: float = 0.05) -> tuple[list[Document], list[Document]]:
    """Training and validation documents. A document's side depends on its content alone, so it never changes sides."""
    if not 0 < validation_share < 1:
        raise UsageError(f"A validation share of {validation_share} was asked for; it must lie between 0 and 1.")
    limit = int(validation_share * 2**32)
    training = [document for document in documents if int(document.digest[:8], 16) >= limit]
    validation = [document for document in documents if int(document.digest[:8], 16) < limit]
    if not training or not validation:
        raise UsageError(
            f"{len(documents)} documents do not split into training and {validation_share:.0%} validation;"
            " give more documents."
        )
    return training, validation


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of the documents, a transformers ``PreTrainedTokenizerFast``.

    vocab_size: at least 257, the bytes and the end-of-text token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UsageError(f"A vocabulary of {vocab_size} was asked for; byte-level BPE needs more than {len(alphabet)}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def encode_documents(documents: Iterable[Document], tokenizer: Any, *, ended: bool) -> list[Encoded]:
    """The documents as token ids, each after an end-of-text token and, if ``ended``, before one of its own."""
    boundary = tokenizer.eos_token_id
    if boundary is None:
        raise UsageError("The tokenizer has no end-of-text token (eos_token) to put between documents; set one.")
    # In one call, so that the tokenizer's threads work on many documents at once.
    encoded = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
    closing = [boundary] if ended else []
    return [Encoded([boundary, *ids, *closing], [True] * (1 + len(ids) + len(closing))) for ids in encoded]


def token_blocks(documents: Iterable[Document], tokenizer: Any, block_length: int) -> Tensor:
    """The documents as blocks of token ids [N, block_length], int64, without bounds between documents.

    Documents follow each other, each after an end-of-text token; what does not fill the last block is left out.
    """
    return stream(encode_documents(documents, tokenizer, ended=False), block_length).ids


def as_blocks(data: Any, block_length: int, tokenizer: Any = None, *, answers_only: bool = True) -> Blocks:
    """What a caller gives as data as blocks of token ids.

    data: a text file, a JSONL or Parquet file of records (see ``records.KINDS``), or a directory of them (needs
    ``tokenizer``); a tensor of ids [n]; a tensor of blocks [N, T] or ``Blocks``, which are taken as they are; or an
    iterable of ids. What is read from files is packed, attention stays within documents, and with ``answers_only`` only
    the answers of chats and prompts count.
    """
    if isinstance(data, Blocks):
        return data
    if isinstance(data, str | os.PathLike):
        if tokenizer is None:
            raise UsageError(f"The text of {data} needs a tokenizer to become token ids; give tokenizer=.")
        return _read_blocks(Path(data), block_length, tokenizer, answers_only)
    if not isinstance(data, Tensor):
        try:
            data = torch.tensor(list(data))
        except (TypeError, ValueError) as error:
            raise TypeError(f"Data has type {type(data).__name__}; give a path or token ids.") from error
    if data.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"Token ids have dtype {data.dtype}; give integers.")
    if data.ndim not in (1, 2) or (data.ndim == 2 and data.shape[1] < 2):
        raise UsageError(f"Token ids have shape {list(data.shape)}; give [n], or blocks [N, T] of two or more tokens.")
    return Blocks(data.long() if data.ndim == 2 else cut(data.long(), block_length))


def _read_blocks(path: Path, block_length: int, tokenizer: Any, answers_only: bool) -> Blocks:
    files = _wanted_files(path)
    records = [file for file in files if file.suffix in SUFFIXES]
    if not records:
        return stream(encode_documents(read_documents(path), tokenizer, ended=True), block_length)
    if len(records) < len(files):
        odd = next(file for file in files if file.suffix not in SUFFIXES)
        raise UsageError(f"{path} holds records ({records[0].name}) and plain text ({odd.name}); give one kind.")
    found = (record for file in records for record in read_records(file))
    documents = [encode(where, record, tokenizer, answers_only=answers_only) for where, record in found]
    blocks = pack(documents, block_length, padding=tokenizer.eos_token_id or 0)
    if not blocks.predictions():
        raise UsageError(f"No token of {path} counts: in blocks of {block_length} tokens there is no answer.")
    return blocks


def _is_wanted(file: Path, root: Path, skipped: frozenset[str]) -> bool:
    parts = file.relative_to(root).parts
    return not any(part.startswith(".") for part in parts) and skipped.isdisjoint(parts[:-1])


def _wanted_files(root: Path, pattern: str = "*", skipped: frozenset[str] = frozenset()) -> list[Path]:
    """A file itself, or a directory's files, sorted; hidden ones are left out."""
    if not root.exists():
        raise UsageError(f"{root} does not exist; give a text file or a directory of text files.")
    if not root.is_dir():
        return [root]
    return sorted(file for file in root.rglob(pattern) if file.is_file() and _is_wanted(file, root, skipped))
