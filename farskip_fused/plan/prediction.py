"""`farskip plan`: a named layer on a named cluster, standard against FarSkip."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from farskip_fused.connectivity import Connectivity
from farskip_fused.errors import UsageError
from farskip_fused.plan.durations import ACHIEVED, CLUSTERS, SHAPES, estimate
from farskip_fused.plan.figure import draw
from farskip_fused.plan.timeline import simulate


def predict(
    model: str, cluster: str, *, ranks: int, tokens: int, sequence: int, figure: Path | None = None
) -> dict[str, Any]:
    """Milliseconds of a layer's forward pass on each GPU.

    Returns the question and {"standard", "farskip", "compute"}: layer times in ms, and of computation alone.
    Raises UsageError for unknown names, which it lists, and impossible splits.
    """
    for what, name, known in (("model", model, SHAPES), ("cluster", cluster, CLUSTERS)):
        if name not in known:
            raise UsageError(f"Unknown {what} {name!r}; use {', '.join(known)}.")
    if figure is not None:
        if figure.suffix not in (".png", ".svg"):
            raise UsageError(f"The figure {figure} must end in .png or .svg.")
        if not figure.parent.is_dir():
            raise UsageError(f"The directory of the figure {figure} does not exist; create it first.")
        if find_spec("matplotlib") is None:
            raise UsageError("A figure needs matplotlib; run: pip install 'farskip-fused[demo]'.")
    durations = estimate(SHAPES[model], CLUSTERS[cluster], tokens=tokens, sequence=sequence, ranks=ranks)
    report = {"model": model, "cluster": cluster, "ranks": ranks, "tokens": tokens, "sequence": sequence}
    times = {name: simulate(Connectivity.named(name), durations).layer_time for name in ("standard", "farskip")}
    if figure is not None:
        draw(
            figure,
            durations,
            f"{model}, {ranks} expert-parallel ranks, {cluster}, {tokens} tokens a GPU: schedule simulated, durations "
            f"from FLOPs at {ACHIEVED:.0%} of peak and bytes at link rate",
        )
    return {**report, **times, "compute": sum(durations.actions.values())}


def sentence(report: dict[str, Any]) -> str:
    return (
        f"{report['model']} on {report['ranks']} x {report['cluster']}, {report['tokens']} tokens a GPU: "
        f"a layer's forward pass takes {report['standard']:.2f} ms standard, {report['farskip']:.2f} ms FarSkip "
        f"({report['standard'] / report['farskip']:.2f}x); computation alone {report['compute']:.2f} ms."
    )
