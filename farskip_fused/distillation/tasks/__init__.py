"""Programming tasks that a model is measured by: prompts, and programs that check what it writes."""

from farskip_fused.distillation.tasks.functions import function_tasks, training_documents
from farskip_fused.distillation.tasks.human_eval import human_eval_tasks
from farskip_fused.distillation.tasks.mbpp import mbpp_tasks
from farskip_fused.distillation.tasks.solving import PassRate, pass_rate
from farskip_fused.distillation.tasks.task import Task

__all__ = [
    "PassRate",
    "Task",
    "function_tasks",
    "human_eval_tasks",
    "mbpp_tasks",
    "pass_rate",
    "training_documents",
]
