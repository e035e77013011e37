"""Records of JSONL and Parquet files: chats, prompts with answers, and plain text, to token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from farskip_fused.distillation.packing import Encoded
from farskip_fused.errors import UsageError

SUFFIXES = (".jsonl", ".parquet")
KINDS = '"messages" (a list of {"role", "content"}), "prompt" and "completion", or "text"'
PARQUET_BATCH = 1024


def read_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each record stands, and the record, of a ``.jsonl`` or ``.parquet`` file."""
    if file.suffix == ".parquet":
        yield from _read_parquet(file)
        return
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{file}, line {number}, is not JSON: {error}.") from None
            if not isinstance(record, dict):
                raise UsageError(f"{file}, line {number}, is not an object; it needs {KINDS}.")
            yield f"{file}, line {number}", record


def _read_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise UsageError(f"{file} needs pyarrow; run: pip install 'farskip-fused[distill]'.") from error

    table, number = parquet.ParquetFile(file), 0
    known = [name for name in ("messages", "prompt", "completion", "text") if name in table.schema_arrow.names]
    for batch in table.iter_batches(PARQUET_BATCH, columns=known):
        for record in batch.to_pylist():
            yield f"{file}, row {number}", {name: value for name, value in record.items() if value is not None}
            number += 1


def encode(where: str, record: dict[str, Any], tokenizer: Any, *, answers_only: bool) -> Encoded:
    """A record as token ids, of which all count, or with ``answers_only`` the answers and what ends them.

    A chat is rendered by the tokenizer's own template, piece by piece: the text up to an answer as it is when the
    model is asked, then the answer. Raises UsageError, naming the place, for a record of another kind.
    """
    ids: list[int] = []
    counted: list[bool] = []
    for text, is_answer in _pieces(where, record, tokenizer):
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += encoded
        counted += [is_answer or not answers_only] * len(encoded)
    return Encoded(ids, counted)


def _pieces(where: str, record: dict[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
    """Pieces of text, and whether each is an answer; of plain text all is."""
    end = tokenizer.eos_token or ""
    if isinstance(record.get("text"), str):
        return [(end + record["text"] + end, True)]
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return [(end + record["prompt"], False), (record["completion"] + end, True)]
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in messages
    ):
        raise UsageError(f"{where}: a record needs {KINDS}.")
    return _pieces_of_chat(where, messages, tokenizer)


def _pieces_of_chat(where: str, messages: list[dict[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    if not tokenizer.chat_template:
        raise UsageError(
            f"{where} is a chat, and the tokenizer has no chat template; use that of the instructed model."
        )
    pieces: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise UsageError(
                f"{where}: the chat template changes earlier messages when one is added; render the chats to"
                ' "prompt" and "completion" yourself.'
            )
        pieces += [(asked[len(done) :], False), (answered[len(asked) :], True)]
        done = answered
    if not pieces:
        raise UsageError(f"{where}: the chat has no message of the assistant.")
    return pieces
