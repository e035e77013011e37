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
    root, skipped = Path(path), frozenset(skip)
    if not root.exists():
        raise UsageError(f"{root} does not exist; give a text file or a directory of text files.")
    found = [root]
    if root.is_dir():
        found = sorted(file for file in root.rglob(pattern) if file.is_file() and _is_wanted(file, root, skipped))
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


def token_blocks(documents: Iterable[Document], tokenizer: Any, block_length: int) -> Tensor:
    """The documents as blocks of token ids [N, block_length], int64.

    Documents follow each other, each after an end-of-text token; what does not fill the last block is left out.
    """
    boundary = tokenizer.eos_token_id
    if boundary is None:
        raise UsageError("The tokenizer has no end-of-text token (eos_token) to put between documents; set one.")
    ids: list[int] = []
    # In one call, so that the tokenizer's threads work on many documents at once.
    for encoded in tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]:
        ids.append(boundary)
        ids.extend(encoded)
    return cut(torch.tensor(ids, dtype=torch.int64), block_length)


def cut(ids: Tensor, block_length: int) -> Tensor:
    """Token ids [n] as blocks [N, block_length]; what does not fill the last block is left out."""
    if block_length < 2:
        raise UsageError(f"Blocks of {block_length} tokens were asked for; 2 are needed to predict one from another.")
    blocks = ids.numel() // block_length
    if blocks == 0:
        raise UsageError(f"The data has {ids.numel()} tokens, less than one block of {block_length}; give more.")
    return ids[: blocks * block_length].view(blocks, block_length)


def as_blocks(data: Any, block_length: int, tokenizer: Any = None) -> Tensor:
    """What a caller gives as data as blocks of token ids [N, T], int64.

    data: a text file or a directory of them (needs ``tokenizer``), a tensor of ids [n], a tensor of blocks [N, T],
    which is taken as it is, or an iterable of ids.
    """
    if isinstance(data, str | os.PathLike):
        if tokenizer is None:
            raise UsageError(f"The text of {data} needs a tokenizer to become token ids; give tokenizer=.")
        return token_blocks(read_documents(data), tokenizer, block_length)
    if not isinstance(data, Tensor):
        try:
            data = torch.tensor(list(data))
        except (TypeError, ValueError) as error:
            raise TypeError(f"Data has type {type(data).__name__}; give a path or token ids.") from error
    if data.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"Token ids have dtype {data.dtype}; give integers.")
    if data.ndim not in (1, 2) or (data.ndim == 2 and data.shape[1] < 2):
        raise UsageError(f"Token ids have shape {list(data.shape)}; give [n], or blocks [N, T] of two or more tokens.")
    return data.long() if data.ndim == 2 else cut(data.long(), block_length)


def _is_wanted(file: Path, root: Path, skipped: frozenset[str]) -> bool:
    parts = file.relative_to(root).parts
    return not any(part.startswith(".") for part in parts) and skipped.isdisjoint(parts[:-1])
