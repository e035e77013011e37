"""Measured choices of block sizes, by GPU and shape; where there is none, the kernels' own rules choose.

``tuned.json`` comes with the package. The environment variable FARSKIP_TUNED names a second table, whose rows come
first; `farskip bench tune` writes such a table. Both are read once. A row counts for the forward GEMMs of one rank:
expert parallelism, whose ranks must agree, takes nothing from here. It may change the last bits of a result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farskip_fused.errors import UsageError
from farskip_fused.kernels.tiles import Choice, choose_tile_rows

SHIPPED = Path(__file__).with_name("tuned.json")
VARIABLE = "FARSKIP_TUNED"


class Row(NamedTuple):
    """One measured choice, for more than half of ``entries`` (tokens times top-k) and at most as many.

    up, down: columns, depth, warps and stages of the up- and of the down-projection in plain Triton.
    """

    device: str
    dtype: str
    hidden: int
    intermediate: int
    experts: int
    entries: int
    tile_rows: int
    up: tuple[int, int, int, int]
    down: tuple[int, int, int, int]
    sorted_copy: bool

    def choice(self) -> Choice:
        return Choice(self.tile_rows, self.up, self.down, self.sorted_copy)


# Shape, and the entries and choice of each of its rows: what a call looks through.
Table = tuple[tuple[tuple[torch.dtype, int, int, int], tuple[tuple[int, Choice], ...]], ...]
_table: Table | None = None


def choose(entries: int, rows: Tensor, w13: Tensor) -> Choice | None:
    """The measured choice for ``entries`` of ``rows`` [., H] and the experts' ``w13``; None to follow the rules."""
    hidden, experts = rows.shape[-1], w13.shape[0]
    twice_intermediate = w13.shape[1] + w13.shape[2] - hidden  # whichever way it lies
    table: Table = _active_table()
    for shape, choices in table:
        if shape == (w13.dtype, hidden, twice_intermediate // 2, experts):
            for most, choice in choices:
                if most < 2 * entries <= 2 * most:
                    return choice
    return None


def tile_rows(entries: int, rows: Tensor, w13: Tensor) -> int:
    """Rows of a tile in the layout of a forward pass."""
    choice = choose(entries, rows, w13)
    return choose_tile_rows(entries, w13.shape[0], w13.dtype) if choice is None else choice.tile_rows


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _active_table() -> Table:
    global _table
    if _table is None:
        extra = os.environ.get(VARIABLE)
        _table = _index((*(read(Path(extra)) if extra else ()), *read(SHIPPED)))
    return _table


@contextmanager
def using(rows: Sequence[Row]) -> Iterator[None]:
    """Within it, these rows are the table."""
    global _table
    before, _table = _table, _index(rows)
    try:
        yield
    finally:
        _table = before


def _index(rows: Sequence[Row]) -> Table:
    """The rows for this device by shape; of two for the same entries the first."""
    device = device_name()
    found: dict[tuple[torch.dtype, int, int, int], dict[int, Choice]] = {}
    for row in rows:
        if row.device == device:
            shape = (getattr(torch, row.dtype), row.hidden, row.intermediate, row.experts)
            found.setdefault(shape, {}).setdefault(row.entries, row.choice())
    return tuple((shape, tuple(choices.items())) for shape, choices in found.items())


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def read(path: Path) -> list[Row]:
    """Rows of a table. Raises UsageError, naming the file, for what is no table."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return [_checked(row) for row in document["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no table of tuned choices ({error!r}); write one with: farskip bench tune --output {path}"
        ) from error


def _checked(fields: Mapping[str, Any]) -> Row:
    row = Row(**{**fields, "up": tuple(fields["up"]), "down": tuple(fields["down"])})
    numbers = (row.hidden, row.intermediate, row.experts, row.entries, row.tile_rows, *row.up, *row.down)
    if len(numbers) != 13 or not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"not four positive integers a tile in {dict(fields)}")
    if row.dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"unknown dtype {row.dtype!r}")
    if any(block & (block - 1) or block < 16 for block in (row.tile_rows, *row.up[:2], *row.down[:2])):
        raise ValueError(f"a block size that is no power of two from 16 on in {dict(fields)}")
    return row


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write a table; rows for the same device, shape and entries take the place of those that are there."""
    merged = {row[:6]: row for row in [*(read(path) if path.exists() else []), *rows]}
    lines = ",\n  ".join(json.dumps(row._asdict()) for row in sorted(merged.values()))
    path.write_text('{"rows": [\n  ' + lines + "\n]}\n" if lines else '{"rows": []}\n', encoding="utf-8")
