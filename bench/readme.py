"""`python -m farskip_fused.bench.readme`: the tables of measurements in README.md, from bench/results/.

``--write FILE`` replaces what stands between each table's marks in FILE. A table says by which command, on what, with
which versions and when it was measured. All times are medians; spreads are half the range between quartiles.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from farskip_fused.bench.report import replace_between
from farskip_fused.bench.result_files import COUNTS, FOLDER, Result, find
from farskip_fused.errors import UsageError

Row = Mapping[str, Any]
TITLES = {"deepseek-v2-lite": "DeepSeek-V2-Lite", "deepseek-v3": "DeepSeek-V3", "qwen3-30b-a3b": "Qwen3-30B-A3B"}
VERSIONS = {
    "driver": "driver ", "torch": "torch ", "triton": "Triton ", "nccl": "NCCL ", "nvidia-nvshmem-cu12": "NVSHMEM ",
    "nvidia-nvshmem-cu13": "NVSHMEM ", "sonic-moe": "SonicMoE ", "vllm": "vLLM ", "date": "",
}  # fmt: skip
LAYERS = {
    "dense": "dense cuBLAS", "ours": "ours", "sonicmoe": "SonicMoE", "grouped_mm": "torch grouped_mm", "vllm": "vLLM"
}  # fmt: skip
STEPS = {"dispatch": "dispatch", "combine of sums": "combine"}
VARIANTS = {"stock": "stock", "kernels": "stock on our kernels", "farskip": "FarSkip wiring"}
OVERLAPPED = ("paper", "fused")
WAYS = {
    "blocking": "blocking", "paper": "by streams", "fused": "fused", "nccl_blocking": "NCCL, blocking",
    "nccl_streams": "NCCL, by streams",
}  # fmt: skip
PASSES = {"forward": "forward", "forward_backward": "forward + backward"}
RETURNED = {"direct": "a row an expert", "presummed": "a sum a rank"}
BOLD = "Bold: fastest by more than both spreads."


def recovery(folder: Path) -> str:
    """pass@1 and KL of each small model: teacher, converted, FCSD and SFT, all seeds."""
    parts = []
    for result in find("recovery", several=False, folder=folder):
        units = result.report["units"]
        rows = []
        for shape, title in (("deepseek", "DeepSeek-V3's shape"), ("qwen", "Qwen3's shape")):
            ways = [
                [each for name, each in units.items() if name.startswith(f"{shape}/{kind}-") and name[-1].isdigit()]
                for kind in ("fcsd", "sft")
            ]
            runs = [[units[f"{shape}/teacher"]], [units[f"{shape}/untrained-all"]], *ways]
            size = f"{units[f'{shape}/teacher']['parameters'] / 1e6:.0f} million"
            rows.append([f"{title}, {size}", "pass@1", *(_seeds(each, "pass_at_1", _percent) for each in runs)])
            rows.append(["", "KL to teacher", "", *(_seeds(each, "kl", "{:.3f}".format) for each in runs[1:])])
        tokens = units["deepseek/fcsd-0"]["tokens"] / 1e6
        caption = (
            f"{_on([result])}: `python -m farskip_fused.bench.recovery`, {tokens:.0f} million tokens of training. Of"
            " several seeds, mean and range."
        )
        header = ("model", "", "teacher", "converted", "FCSD", "SFT")
        parts.append(_with_caption(caption, header, rows))
    return _joined(parts)


def experts(folder: Path) -> str:
    """The expert layer beside its peers, forward and with backward."""
    parts = []
    for result in find("experts-fine-grained", several=False, folder=folder):
        layers = result.report["layers"]
        columns = [name for name in LAYERS if any(name in layer["forward"] for layer in layers)]
        rows = []
        for layer in layers:
            texts: dict[str, list[str]] = {name: [] for name in columns}
            for direction in PASSES:
                cells = layer[direction]
                fastest = _fastest({name: cell for name, cell in cells.items() if name != "dense"})
                for name, cell in cells.items():
                    texts[name].append(_bold(f"{cell['ms']:.2f}", name == fastest))
            rows.append([_title(layer["shape"]), str(layer["tokens"]), *(", ".join(texts[name]) for name in columns)])
        absent = [LAYERS[name] for name in result.report["missing"] if name in LAYERS]
        spreads = [cell for layer in layers for direction in PASSES for cell in layer[direction].values()]
        caption = (
            f"{_on([result])}: `{_command('experts', layers)}`, bf16, uniform routing, one run. ms, forward, then"
            f" forward and backward; spreads are at most {_largest_spread(spreads)}. {BOLD}"
            + (f" Not installed: {', '.join(absent)}." if absent else "")
        )
        parts.append(_with_caption(caption, ("shape", "T", *(LAYERS[name] for name in columns)), rows))
    return _joined(parts)


def exchange(folder: Path) -> str:
    """Dispatch and combine between GPUs beside others' all-to-all; then between ranks of one GPU beside DeepEP."""
    return _joined([*map(_between_gpus, find("comm", several=True, folder=folder)), *_beside_deepep(folder)])


def _between_gpus(result: Result) -> str:
    rows = [row for row in result.report["rows"] if row["step"] in STEPS]
    columns = _unique((row["by"], row["sms"]) for row in rows)
    lines = []
    for key in _unique((row["shape"], row["tokens"], row["step"]) for row in rows):
        same = {(row["by"], row["sms"]): row for row in rows if (row["shape"], row["tokens"], row["step"]) == key}
        fastest = _fastest(same)
        texts = [_bold(f"{same[at]['ms']:.3f}", at == fastest) if at in same else "" for at in columns]
        lines.append([_title(key[0]), str(key[1]), STEPS[key[2]], *texts])
    sms = _unique(count for _, count in columns if count)
    flags = {"ranks": [result.gpus], "sms": sms, "tokens": _unique(row["tokens"] for row in rows)}
    caption = (
        f"{_on([result])}: `{_command('comm', rows, **flags)}`, bf16, layout known, combine of one sum a token"
        f" and rank, one run. ms, slowest rank; spreads are at most {_largest_spread(rows)}. {BOLD}"
    )
    titles = [by if count is None else f"{by}, {count} SMs" for by, count in columns]
    return _with_caption(caption, ("shape", "T a rank", "step", *titles), lines, keys=2)


def _beside_deepep(folder: Path) -> Iterable[str]:
    for result in find("comm-4-ranks", several=False, folder=folder):
        rows = [row for row in result.report["rows"] if row["step"] in STEPS and row["deepep_ms"] is not None]
        flags = {key: _unique(row[key] for row in rows) for key in ("ranks", "sms", "tokens")}
        caption = (
            f"{_on([result])}, 4 ranks side by side under MPS: `{_command('comm', rows, **flags)}`. ms; DeepEP"
            " v1.2.1 ran on one H100 in the same way, earlier."
        )
        lines = [
            [_title(row["shape"]), str(row["sms"]), STEPS[row["step"]], f"{row['ms']:.2f}", f"{row['deepep_ms']:.2f}"]
            for row in rows
        ]
        yield _with_caption(caption, ("shape", "SMs a rank", "step", "ours", "DeepEP"), lines, keys=2)


def fused(folder: Path) -> str:
    """The experts' part of a layer: communication and GEMMs apart, one after the other, fused."""
    results = find("fused", several=True, folder=folder)
    if not results:
        return ""
    rows, lines = [], []
    for result in results:
        whole = [row for row in result.report["rows"] if row["part"].startswith("layer ")]
        rows += whole
        for row in whole:
            ways = {way: _cell(row, way) for way in ("unfused", "fused")}
            fastest = _fastest(ways)
            texts = [_bold(f"{row[f'{way}_ms']:.3f}", way == fastest) for way in ("comm", "gemm", *ways)]
            link = "NVLink" if row["link_gigabytes_per_second"] is None else row["link"]
            name = f"{result.gpus} x {_gpu(result)}"
            lines.append([name, _title(row["shape"]), link, row["part"].removeprefix("layer "), *texts])
    command = _command(
        "fused", rows, ranks=_unique(row["ranks"] for row in rows), link=_unique(r["link"] for r in rows)
    )
    caption = (
        f"{_on(results)}: `{command}`, bf16, {_tokens(rows)}; {_shares(rows)} for communication where it runs beside"
        f" GEMMs. ms, slowest rank. {BOLD}"
    )
    header = ("GPUs", "shape", "link", "pass", "communication", "GEMMs", "one after the other", "fused")
    return _with_caption(caption, header, lines, keys=3)


def all_reduce(folder: Path) -> str:
    """All-reduces by size, each in the faster of its forms."""
    parts = []
    for result in find("all-reduce", several=True, folder=folder):
        rows = result.report["rows"]
        tokens, ways = _unique(row["tokens"] for row in rows), _unique((row["by"], row["sms"]) for row in rows)
        best: dict[tuple[Any, int], Row] = {}
        for row in sorted(rows, key=lambda row: -row["ms"]):
            best[(row["by"], row["sms"]), row["tokens"]] = row
        winners = {count: _fastest({way: best[way, count] for way in ways if (way, count) in best}) for count in tokens}
        lines = []
        for by, sms in ways:
            times = [best.get(((by, sms), count)) for count in tokens]
            texts = [
                _bold(f"{1e3 * time['ms']:.0f}", winners[count] == (by, sms)) if time else ""
                for count, time in zip(tokens, times, strict=True)
            ]
            lines.append([f"{by}, {sms} SMs" if sms else by, *texts])
        sizes = _unique(row["hidden"] for row in rows)
        flags = {"ranks": [result.gpus], "hidden": sizes}
        caption = (
            f"{_on([result])}: `{_command('all-reduce', (), **flags)}`, bf16. µs by tokens of {sizes[0]} values, the"
            f" faster of one shot and two. {BOLD}"
        )
        parts.append(_with_caption(caption, ("T", *map(str, tokens)), lines))
    return _joined(parts)


def layers(folder: Path) -> str:
    """Whole decoder layers, a table for each machine."""
    machines: dict[tuple[int, str], list[Result]] = {}
    for result in find("layer-.*", several=True, folder=folder):
        machines.setdefault((result.gpus, _gpu(result)), []).append(result)
    return _joined([_layers_of(results) for results in machines.values()])


def _layers_of(results: Sequence[Result]) -> str:
    found: dict[tuple[Any, ...], tuple[Row, Path]] = {}
    for result in results:
        for row in result.report["rows"]:
            key = tuple(row[name] for name in ("shape", "tokens", "link", "direction"))
            if key in found:
                raise UsageError(f"{result.path.name} and {found[key][1].name} both hold {', '.join(map(str, key))}.")
            found[key] = (row, result.path)
    rows = sorted((row for row, _ in found.values()), key=_order)
    several = len(_unique(row["tokens"] for row in rows)) > 1
    ways = [way for way in WAYS if any(f"{way}_ms" in row for row in rows)]
    cells, lines = [], []
    for row in rows:
        timed = {way: _cell(row, way) for way in ways if f"{way}_ms" in row}
        cells += [_cell(row, "computation"), *timed.values()]
        fastest = _fastest(timed)
        texts = [_bold(f"{timed[way]['ms']:.3f}", way == fastest) if way in timed else "" for way in ways]
        shares = " / ".join(_share(row[f"{way}_overlap"]) for way in OVERLAPPED)
        gains = " / ".join(f"{row[f'{way}_speedup']:.2f}" for way in OVERLAPPED)
        title = _title(row["shape"]) + (f", T {row['tokens']}" if several else "")
        returned = "a sum a rank" if row["link"].startswith("ib") else RETURNED[row.get("fused_combine", "direct")]
        computation = f"{row['computation_ms']:.3f}"
        lines.append([title, _link(row), PASSES[row["direction"]], computation, *texts, returned, shares, gains])
    links = _unique(row["link"] for row in rows)
    caption = (
        f"{_on(results)}: `{_command('layer', rows, ranks=[results[0].gpus], link=links)}`, {_tokens(rows)}, bf16;"
        f" {_shares(rows)} for communication. ms a layer, slowest rank; spreads are at most {_largest_spread(cells)}."
        f" {BOLD} Times of one model and link are of one run."
    )
    header = (
        "model", "link", "pass", "computation alone", *(WAYS[way] for way in ways), "fused returns",
        "hidden, streams / fused", "speed-up, streams / fused",
    )  # fmt: skip
    return _with_caption(caption, header, lines, keys=2)


def vllm(folder: Path) -> str:
    """Prefill and decode in vLLM."""
    parts = []
    results = [result for several in (False, True) for result in find("vllm-.*", several=several, folder=folder)]
    for result in results:
        points = result.report["points"]
        # Reports of before there was a choice do not say.
        busy = result.report.get("gpu_time", False)
        what, option, digits = ("ms that a GPU is busy", " --gpu-time", 2) if busy else ("ms", "", 1)
        lines = []
        for point in points:
            variants = point["variants"]
            fastest = _fastest(variants)
            times = {name: _bold(f"{variants[name]['ms']:.{digits}f}", name == fastest) for name in VARIANTS}
            texts = [f"{ms} ± {variants[name]['spread_ms']:.{digits}f}" for name, ms in times.items()]
            phase = f"{point['new_tokens']} decode steps" if point["new_tokens"] else "prefill"
            lines.append([_title(point["model"]), f"{point['batch']} x {point['prompt']}", phase, *texts])
        models = " ".join(_unique(point["model"] for point in points))
        split = f" --ranks {result.gpus}" if result.gpus > 1 else ""
        caption = (
            f"{_on([result])}: `farskip bench vllm {models}{split}{option}`, CUDA graphs on,"
            f" {result.report['layers']} layers, dummy weights, one run. {what} ± spread. {BOLD}"
        )
        parts.append(_with_caption(caption, ("model", "prompts", "phase", *VARIANTS.values()), lines))
    return _joined(parts)


SECTIONS: dict[str, Callable[[Path], str]] = {
    "recovery": recovery, "experts": experts, "exchange": exchange, "fused": fused, "all-reduce": all_reduce,
    "layers": layers, "vllm": vllm,
}  # fmt: skip


def written(text: str, folder: Path = FOLDER) -> str:
    """``text`` with every table replaced; UsageError where marks are missing, or results that a table needs."""
    for name, section in SECTIONS.items():
        content = section(folder)
        if not content:
            raise UsageError(f"{folder} holds no results for the table {name!r}; make bench measures them.")
        text = replace_between(text, (f"<!-- {name} -->", f"<!-- end of {name} -->"), content)
    return text


def _with_caption(caption: str, header: Sequence[str], lines: Sequence[Sequence[str]], keys: int = 1) -> str:
    """keys: columns whose cells are empty where they repeat the line above."""
    rows = (header, *_without_repeats(lines, keys))
    table = ["|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in rows]
    table.insert(1, "|" + "---|" * len(header))
    words = textwrap.fill(caption, 120, break_long_words=False, break_on_hyphens=False)
    return "\n".join([words, "", *table])


def _without_repeats(lines: Sequence[Sequence[str]], keys: int) -> Iterator[Sequence[str]]:
    above: Sequence[str] = [""] * keys
    for line in lines:
        same = next((at for at in range(keys) if line[at] != above[at]), keys)
        yield [*[""] * same, *line[same:]]
        above = line


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(parts)


def _on(results: Sequence[Result]) -> str:
    """The machines, and between commas the versions and dates of all results."""
    machines = _listed(_unique(f"{COUNTS[result.gpus]} {_gpu(result)}" for result in results))
    facts = []
    for key, name in VERSIONS.items():
        values = sorted({each[key] for result in results if key in (each := result.report["environment"])})
        facts += [name + " and ".join(values)] if values else []
    return f"{machines[0].upper()}{machines[1:]} ({', '.join(facts)})"


def _gpu(result: Result) -> str:
    return str(result.report["environment"]["gpu"]).removeprefix("NVIDIA ")


def _command(benchmark: str, rows: Iterable[Row], **flags: Sequence[Any]) -> str:
    options = [f"--{flag} {value}" for flag, values in flags.items() for value in values]
    return " ".join(["farskip bench", benchmark, *_unique(row["shape"] for row in rows), *options])


def _listed(values: Sequence[Any]) -> str:
    """``1, 2 and 3``."""
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _title(shape: str) -> str:
    return TITLES.get(shape, shape)


def _tokens(rows: Sequence[Row]) -> str:
    return f"{_listed(sorted({row['tokens'] for row in rows}))} tokens a rank"


def _shares(rows: Sequence[Row]) -> str:
    """Multiprocessors of communication."""
    return " and ".join(_unique(f"{row['comm_sms']} of {row['comm_sms'] + row['gemm_sms']} SMs" for row in rows))


def _link(row: Row) -> str:
    rate = row["link_gigabytes_per_second"]
    return "NVLink" if rate is None else f"{rate:g} GB/s" + (", by puts" if row["link"].startswith("ib") else "")


def _order(row: Row) -> tuple[Any, ...]:
    rate = row["link_gigabytes_per_second"]
    return (
        _title(row["shape"]),
        row["tokens"],
        row["link"].startswith("ib"),
        -(rate or float("inf")),
        list(PASSES).index(row["direction"]),
    )


def _cell(row: Row, way: str) -> dict[str, float]:
    return {"ms": row[f"{way}_ms"], "spread_ms": row[f"{way}_spread_ms"]}


def _fastest(cells: Mapping[Any, Row]) -> Any:
    """Which is faster than the next by more than the spreads of both; None if none is, or there is no other."""
    ordered = sorted(cells, key=lambda name: cells[name]["ms"])
    if len(ordered) < 2:
        return None
    first, second = (cells[name] for name in ordered[:2])
    return ordered[0] if second["ms"] - first["ms"] > first["spread_ms"] + second["spread_ms"] else None


def _largest_spread(cells: Iterable[Row]) -> str:
    return f"{100 * max(cell['spread_ms'] / cell['ms'] for cell in cells):.1f} %"


def _bold(text: str, wanted: bool) -> str:
    return f"**{text}**" if wanted else text


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _share(overlap: float | None) -> str:
    """Of communication that is hidden; a dash where there is none to hide."""
    return "-" if overlap is None else "none" if overlap <= 0 else f"{100 * overlap:.0f} %"


def _seeds(runs: Sequence[Row], key: str, words: Callable[[float], str]) -> str:
    values = [run[key] for run in runs]
    if len(values) == 1:
        return words(values[0])
    return f"{words(fmean(values))} ({words(min(values))} to {words(max(values))}, {len(values)} seeds)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the tables between the marks in FILE")
    file = parser.parse_args().write
    print(_joined(section(FOLDER) for section in SECTIONS.values()))
    if file is not None:
        file.write_text(written(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
