"""What bench/recovery.py found: tables for people and for docs/recovery.md, and its figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from farskip_fused.bench.report import replace_between
from farskip_fused.plan.figure import new_figure

MARKS = ("<!-- recovery -->", "<!-- end of recovery -->")
Results = Mapping[str, dict[str, Any]]

SHAPES = {"deepseek": "DeepSeek-V3 shape, one shared expert", "qwen": "Qwen3-MoE shape, no shared experts"}
# The paper's remaining divergence of FCSD, relative to SFT's, that a reproduction should reach here.
AIM = 0.7
SHARES = {"1": "one layer", "25%": "25 %", "50%": "50 %", "75%": "75 %"}


def write(results: Results, about: Mapping[str, str], folder: Path | None, console: Console) -> None:
    """Prints all tables; with a folder also writes its figures, and the tables between the marks of recovery.md."""
    text = document(results, about)
    console.print(Markdown(text))
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recovery.md"
    around = file.read_text(encoding="utf-8") if file.exists() else f"{MARKS[0]}\n{MARKS[1]}\n"
    file.write_text(replace_between(around, MARKS, text.rstrip()), encoding="utf-8")
    for shape in SHAPES:
        if f"{shape}/fcsd-0" in results:
            _draw(results, shape, folder / f"recovery-{shape}.png")


def document(results: Results, about: Mapping[str, str]) -> str:
    parts = [
        f"On {about['device']}, torch {about['torch']}. KL and cross-entropy are in nats a token of held-out files;"
        " pass@1 is of generated small functions, with the 95 % interval of its paired difference from the teacher,"
        " in points.\n",
    ]
    for shape, title in SHAPES.items():
        if f"{shape}/teacher" in results:
            parts += _section(results, shape, title)
    return "\n".join(parts)


def _section(results: Results, shape: str, title: str) -> list[str]:
    teacher = results[f"{shape}/teacher"]
    sources = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in teacher["sources"].items())
    lines = [
        f"## {title}",
        f"{teacher['parameters'] / 1e6:.1f} million parameters, trained on {teacher['tokens'] / 1e6:.1f} million tokens"
        f" ({sources}, and solved small functions).\n",
        "| model | tokens | cross-entropy | KL to teacher | top-1 agreement | pass@1 | difference |",
        "|---|---|---|---|---|---|---|",
        f"| teacher | {teacher['tokens'] / 1e6:.1f}M | {teacher['val_ce']:.4f} | | | {teacher['pass_at_1']:.1%} | |",
    ]
    prefix = f"{shape}/"
    found = {name.removeprefix(prefix): each for name, each in results.items() if name.startswith(prefix)}
    rows = {name: each for name, each in found.items() if "kl" in each and name != "teacher"}
    untrained = {name: each for name, each in rows.items() if name.startswith("untrained")}
    trained = {name: each for name, each in rows.items() if name not in untrained}
    for name, each in (trained | untrained).items():
        tokens = f"{each['tokens'] / 1e6:.1f}M" if "tokens" in each else "0"
        mean, half = paired(each["solved"], teacher["solved"])
        lines.append(
            f"| {name.replace('-', ' ')} | {tokens} | {each['val_ce']:.4f} | {each['kl']:.4f} |"
            f" {each['agreement']:.1%} | {each['pass_at_1']:.1%} | {100 * mean:+.1f} ± {100 * half:.1f} |"
        )
    return [*lines, "", *_verdict(found, teacher), f"![]({f'recovery-{shape}.png'})\n"]


def _verdict(found: Results, teacher: Mapping[str, Any]) -> list[str]:
    """Whether the aims are met, in words."""
    of = {
        kind: [each for name, each in found.items() if name.startswith(f"{kind}-") and name[-1].isdigit()]
        for kind in ("fcsd", "sft")
    }
    kl = {kind: [each["kl"] for each in runs] for kind, runs in of.items()}
    if not kl["fcsd"] or not kl["sft"]:
        return []
    means = {kind: statistics.fmean(values) for kind, values in kl.items()}
    ratio = means["fcsd"] / means["sft"]
    spread = {kind: max(values) - min(values) for kind, values in kl.items()}
    sentences = [
        f"FCSD's remaining KL is {ratio:.2f} of SFT's ({means['fcsd']:.4f} and {means['sft']:.4f}, means of"
        f" {len(kl['fcsd'])} seeds, ranges {spread['fcsd']:.4f} and {spread['sft']:.4f}); the aim, at most {AIM}, is"
        f" {'met' if ratio <= AIM else 'not met'}."
    ]
    differences = [paired(each["solved"], teacher["solved"]) for each in of["fcsd"]]
    within = all(abs(mean) <= 0.01 for mean, _ in differences)
    said = ", ".join(f"{100 * mean:+.1f} ± {100 * half:.1f}" for mean, half in differences)
    sentences.append(
        f"FCSD's pass@1 differs from the teacher's by {said} points over {len(teacher['solved'])} tasks; the aim,"
        f" within one point, is {'met' if within else 'not met'}."
    )
    return [" ".join(sentences) + "\n"]


def paired(solved: Sequence[bool], teacher: Sequence[bool]) -> tuple[float, float]:
    """Mean difference of a task's outcome from the teacher's, and half of its 95 % interval (normal approximation)."""
    differences = [float(mine) - float(theirs) for mine, theirs in zip(solved, teacher, strict=True)]
    half = 1.96 * statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.fmean(differences), half


def _draw(results: Results, shape: str, path: Path) -> None:
    """Left: pass@1 without training by converted layers (the paper's Fig. 3); right: KL that training leaves."""
    figure = new_figure(10, 3.8)
    by_layers, remaining = figure.subplots(1, 2)
    teacher = results[f"{shape}/teacher"]
    for side, label, colour in (("first", "from the start", "#d95f02"), ("last", "from the end", "#1b9e77")):
        names = [*(f"{side}-{share}" for share in SHARES), "all"]
        found = [results.get(f"{shape}/untrained-{name}") for name in names]
        places = [0, *range(1, 5)]
        points = [(place, each["pass_at_1"]) for place, each in zip(places, found, strict=True) if each]
        if points:
            by_layers.plot(*zip(*points, strict=True), color=colour, marker="o", label=label)
    by_layers.axhline(teacher["pass_at_1"], color="black", linewidth=0.8, linestyle=":", label="teacher")
    by_layers.set_xticks(range(5), [*SHARES.values(), "all"])
    by_layers.set(xlabel="converted layers, no training", ylabel="pass@1", ylim=(0, None))
    by_layers.legend(frameon=False, fontsize=8)
    trained = [
        (name.partition("/")[2], each["kl"])
        for name, each in results.items()
        if name.startswith(f"{shape}/") and "kl" in each and "tokens" in each
    ]
    names_of, values = zip(*trained, strict=True)
    remaining.barh(range(len(values)), values, color="#7570b3")
    remaining.set_yticks(range(len(values)), [name.replace("-", " ") for name in names_of], fontsize=7)
    remaining.invert_yaxis()
    remaining.set(xlabel="KL to teacher after training, nats a token")
    for axes in (by_layers, remaining):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
