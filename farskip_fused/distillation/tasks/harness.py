"""Any task of lm-eval, through its Python API, on a model that is loaded already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from farskip_fused.errors import UsageError


def lm_eval_scores(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """The scores of each task by metric.

    folder: of task descriptions (YAML) of your own. limit: examples of each task. Raises UsageError without lm-eval and
    for tasks that it does not know.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise UsageError("These tasks need lm-eval; run: pip install 'farskip-fused[eval]'.") from error

    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise UsageError(
            f"lm-eval knows no task {', '.join(unknown)}; see `lm-eval ls tasks`, or name a folder of yours."
        )
    scored = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        log_samples=False,
    )
    return {
        name: {key: value for key, value in values.items() if isinstance(value, float)}
        for name, values in scored["results"].items()
    }
