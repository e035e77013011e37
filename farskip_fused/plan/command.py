"""`farskip plan`: a prediction or a sweep on the screen, and as figure, page and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from farskip_fused.errors import UsageError
from farskip_fused.plan import rendering
from farskip_fused.plan.figure import checked_path, draw
from farskip_fused.plan.job import Job
from farskip_fused.plan.page import write_page
from farskip_fused.plan.prediction import predict
from farskip_fused.plan.splits import parse_swept, sweep


def run(
    job: Mapping[str, Any], *, swept: str | None = None, figure: Path | None = None, html: Path | None = None
) -> dict[str, Any]:
    """Print, write what was asked for, and return what --json holds. job: arguments of a ``Job``."""
    names = parse_swept(swept) if swept is not None else None
    if figure is not None:
        checked_path(figure, ".png", ".svg")
    if html is not None:
        checked_path(html, ".html")
        if names is not None:
            raise UsageError("--html shows one split; leave out --sweep.")
    if names is not None:
        splits = sweep(job, names)
        rendering.render_sweep(splits)
        report, shown = splits.to_dict(), splits.predictions[0].job
    else:
        prediction = predict(Job(**job))
        rendering.render(prediction)
        report, shown = prediction.to_dict(), prediction.job
        if html is not None:
            write_page(html, prediction)
    if figure is not None:
        draw(figure, shown, splits if names is not None else sweep(shown))
    return report
