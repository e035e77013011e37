"""How the demo shows its results: the curves of the recovery and one table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from farskip_fused.distillation import DistillationReport, Evaluation
from farskip_fused.plan.figure import new_figure

# Name in the report: label, colour, whether it started from the converted model.
RUNS = {
    "fcsd": ("FCSD (converted)", "#d95f02", True),
    "sft": ("SFT (converted)", "#7570b3", True),
    "control": ("control (unconverted)", "#666666", False),
}


def draw_recovery(
    path: Path, teacher: Evaluation, converted: Evaluation, reports: Mapping[str, DistillationReport]
) -> None:
    """KL to the teacher and validation cross-entropy over tokens, as a PNG or SVG."""
    figure = new_figure(9.5, 3.8)
    divergence, cross_entropy = figure.subplots(1, 2)
    for name, (label, color, from_converted) in RUNS.items():
        start = converted if from_converted else Evaluation(teacher.val_ce, 0.0, 1.0)
        points = [(0, start), *reports[name].evaluations]
        thousands = [tokens / 1000 for tokens, _ in points]
        style = {"color": color, "label": label, "marker": "o", "markersize": 3.5, "linewidth": 1.6}
        divergence.plot(thousands, [each.kl for _, each in points], **style)
        cross_entropy.plot(thousands, [each.val_ce for _, each in points], **style)
    cross_entropy.axhline(teacher.val_ce, color="black", linewidth=0.8, linestyle=":", label="teacher")
    divergence.set_ylabel("KL(teacher || model), nats a token")
    divergence.set_ylim(bottom=0)
    cross_entropy.set_ylabel("validation cross-entropy, nats a token")
    for axes in (divergence, cross_entropy):
        axes.set_xlabel("thousand tokens of training")
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    cross_entropy.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def results_table(report: Mapping[str, Any]) -> Table:
    """The report's numbers that answer the demo's questions."""
    caption = (
        f"{report['damage_left']:.0%} of the damage is left after FCSD. Reloaded in a new process: difference"
        f" {report['reload_max_abs_diff']}. Experts over {report['ep']['world']} ranks ({report['ep']['backend']}):"
        f" relative error {report['ep']['forward_rel_error']:.1e} forward,"
        f" {report['ep']['backward_rel_error']:.1e} backward. {report['seconds']:.0f} s in all."
    )
    table = Table(title="FarSkip on a small DeepSeek-V3", caption=caption)
    for column in ("model", "validation CE", "KL to teacher", "agreement"):
        table.add_column(column, justify="left" if column == "model" else "right")
    rows = {
        "unigram": report["unigram"],
        "teacher": report["teacher"],
        "converted: all layers": report["converted"]["all"],
        "converted: last half": report["converted"]["last_half"],
        "converted: attention only": report["converted"]["attention_only"],
        "converted: MoE only": report["converted"]["moe_only"],
        "recovered by FCSD": report["fcsd"],
        "SFT, same tokens": report["sft"],
        "control: unconverted": report["control"],
    }
    for label, values in rows.items():
        table.add_row(
            label,
            f"{values['val_ce']:.4f}",
            f"{values['kl']:.4f}" if "kl" in values else "",
            f"{values['agreement']:.1%}" if "agreement" in values else "",
        )
    return table
