"""`farskip bench tune`: which block sizes are fastest on this GPU, as rows of a table that ``tuning.py`` reads.

A forward pass of the experts is timed as in decode: CUDA graphs of several calls on rotated copies of the layer. The
search goes one choice at a time (rows of a tile, the up-projection, the down-projection, a sorted copy) and starts
from what the rules choose; only what beats that becomes a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from farskip_fused import tuning
from farskip_fused.bench import decode, timing
from farskip_fused.bench.peers import Problem, as_peer
from farskip_fused.bench.shapes import Shape, parse_shape
from farskip_fused.errors import UsageError
from farskip_fused.kernels import hopper
from farskip_fused.kernels.layout import can_stay_unsorted
from farskip_fused.kernels.machine import padded
from farskip_fused.kernels.tiles import Choice, choose_tile, choose_tile_rows

DTYPE = torch.bfloat16
TILE_ROWS = (16, 32, 64, 128)
# Columns, depth, warps, stages: for tiles of up to 32 rows, and for taller ones.
SHORT_TILES = (
    (32, 128, 4, 4), (32, 256, 4, 3), (32, 256, 4, 4), (64, 64, 4, 5), (64, 128, 4, 3), (64, 128, 4, 4),
    (64, 128, 8, 4), (64, 256, 8, 3), (128, 64, 4, 4), (128, 128, 8, 3),
)  # fmt: skip
TALL_TILES = ((64, 64, 4, 4), (64, 128, 8, 3), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4))
LEAST_GAIN = 0.01

Timer = Callable[[Sequence[Choice]], Mapping[Choice, timing.Timing]]


def run(shapes: Sequence[str], tokens: Sequence[int], output: Path) -> list[dict[str, Any]]:
    """Search for every shape and number of tokens, in bfloat16, and write what was found to ``output`` at the end.

    Returns one row each: shape, tokens, what the rules choose and what was fastest, and the ms of both.
    Raises UsageError for an unknown shape, an output that is no table, and without a GPU.
    """
    parsed = {name: parse_shape(name) for name in shapes}
    if output.exists():
        tuning.read(output)  # better refused now than when all is measured
    elif not output.parent.is_dir():
        raise UsageError(f"--output {output}: the directory {output.parent} does not exist; create it.")
    if not torch.cuda.is_available():
        raise UsageError("farskip bench tune measures a CUDA GPU and this machine has none.")
    results = []
    with Console(stderr=True).status("") as status:
        for name, shape in parsed.items():
            layers = decode.make_copies(shape, max(tokens))
            for count in tokens:
                status.update(f"{name}, {count} tokens")
                found = search(shape, count, layer_timer(shape, count, layers))
                results.append({"shape": name, "tokens": count, **found})
    write(output, parsed, results)
    return results


def write(output: Path, shapes: Mapping[str, Shape], results: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        as_row(shapes[result["shape"]], result["tokens"], result["fastest"])
        for result in results
        if result["fastest"] != result["rule"]
    ]
    tuning.write(output, rows)


def as_row(shape: Shape, tokens: int, choice: Choice) -> tuning.Row:
    entries = padded(tokens * shape.top_k)
    return tuning.Row(
        tuning.device_name(), str(DTYPE).removeprefix("torch."), shape.hidden, shape.intermediate, shape.experts,
        entries, *choice,
    )  # fmt: skip


def rule(shape: Shape, tokens: int) -> Choice:
    """What is chosen without a table."""
    return with_tile_rows(shape, choose_tile_rows(tokens * shape.top_k, shape.experts, DTYPE))


def with_tile_rows(shape: Shape, tile_rows: int) -> Choice:
    tile = choose_tile(tile_rows, DTYPE)
    sizes = (tile.columns, tile.depth, tile.warps, tile.stages)
    return Choice(tile_rows, sizes, sizes, shape.intermediate >= hopper.SORTED_COPY_FROM)


def search(shape: Shape, tokens: int, time: Timer) -> dict[str, Any]:
    """The rule's choice and the fastest, the same unless another is faster by more than chance; ms of both."""
    first = rule(shape, tokens)
    best = first
    for part in ("tile_rows", "up", "down", "sorted_copy"):
        times = time([best, *others(shape, tokens, best, part)])
        best = min(times, key=lambda choice: times[choice].ms)
    times = time(list(dict.fromkeys([first, best])))
    gain = times[first].ms - times[best].ms
    if gain <= LEAST_GAIN * times[first].ms or gain <= times[first].spread_ms + times[best].spread_ms:
        best = first
    return {"rule": first, "fastest": best, "rule_ms": times[first].ms, "ms": times[best].ms}


def others(shape: Shape, tokens: int, choice: Choice, part: str) -> list[Choice]:
    """Choices that differ in that part."""
    if part in ("up", "down"):
        tiles = SHORT_TILES if choice.tile_rows <= 32 else TALL_TILES
        return [Choice(**{**choice._asdict(), part: tile}) for tile in tiles if tile != getattr(choice, part)]
    if part == "tile_rows" and not can_stay_unsorted(tokens, shape.top_k, shape.experts):
        return [with_tile_rows(shape, rows) for rows in TILE_ROWS if rows != choice.tile_rows]
    if part == "sorted_copy" and choice.tile_rows == hopper.TILE_ROWS:
        return [choice._replace(sorted_copy=not choice.sorted_copy)]
    return []


def layer_timer(shape: Shape, tokens: int, layers: Sequence[Any]) -> Timer:
    """Times a forward pass of the layers with each choice; what does not fit on the GPU is left out."""
    rotated = decode.rotated(layers)
    problems = [Problem.random(shape, tokens, layer.w13, layer.w2) for layer in rotated]

    def time(choices: Sequence[Choice]) -> dict[Choice, timing.Timing]:
        graphs = {}
        for choice in choices:
            with tuning.using([as_row(shape, tokens, choice)]):
                try:
                    graphs[choice] = decode.capture(problems, [as_peer(layer) for layer in rotated])
                except triton.runtime.errors.OutOfResources:
                    continue
        named = {str(number): graph for number, graph in enumerate(graphs.values())}
        times = timing.interleave(named, budget_ms=300.0, fewest=20).values()
        return {choice: one.over(len(rotated)) for choice, one in zip(graphs, times, strict=True)}

    return time


def render(results: Sequence[Mapping[str, Any]], output: Path) -> None:
    table = Table("shape", "T", "by rule, µs", "fastest, µs", "gain", "rows", "up", "down", "sorted copy")
    for result in results:
        choice = result["fastest"]
        table.add_row(
            result["shape"], str(result["tokens"]), f"{1e3 * result['rule_ms']:.1f}", f"{1e3 * result['ms']:.1f}",
            "" if choice == result["rule"] else f"{result['rule_ms'] / result['ms'] - 1:.1%}",
            *(str(value) for value in choice),
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"Written to {output}; {tuning.VARIABLE}={output} makes the package use it.", highlight=False)
