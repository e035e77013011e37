"""What share of tasks a model solves at its first, greedy attempt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from farskip_fused.distillation.forward import device_of, eval_mode
from farskip_fused.distillation.tasks.sandbox import SECONDS, run_programs
from farskip_fused.distillation.tasks.task import Task
from farskip_fused.errors import UsageError

# Tokens at the end of what is written in which a stop is looked for.
TAIL = 8


@dataclass(frozen=True)
class PassRate:
    """Of each task, in order, whether it was solved, and why not."""

    solved: list[bool]
    errors: list[str]

    @property
    def share(self) -> float:
        """pass@1."""
        return sum(self.solved) / len(self.solved)

    def to_dict(self) -> dict[str, Any]:
        return {"pass_at_1": self.share, "tasks": len(self.solved), "solved": self.solved}


def pass_rate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    max_new_tokens: int = 256,
    batch: int = 128,
    most_tokens: int | None = None,
    together: bool = False,
    seconds: float = SECONDS,
    on_batch: Callable[[int], None] = lambda tasks: None,
) -> PassRate:
    """pass@1 of greedy continuations; a task is solved if its program runs to its end, in a sandbox.

    batch: prompts that are continued at a time, fewer where they would have more than ``most_tokens`` with padding;
    together: whether the model is split over ranks, which then all call with the same tasks: none stops writing before
    the others. seconds: that a program may take. on_batch: called with the number of tasks after each batch has been
    written.
    """
    if not tasks:
        raise UsageError("No tasks were given; give some.")
    if most_tokens is not None:
        longest = max(len(_encoded(tokenizer, task.asked)) for task in tasks)
        batch = max(1, min(batch, most_tokens // longest))
    programs = []
    with eval_mode(model), torch.no_grad():
        for start in range(0, len(tasks), batch):
            part = tasks[start : start + batch]
            written = continue_prompts(model, tokenizer, part, max_new_tokens, together=together)
            programs += [task.program(text) for task, text in zip(part, written, strict=True)]
            on_batch(len(part))
    outcomes = run_programs(programs, seconds=seconds)
    return PassRate([each.passed for each in outcomes], [each.error for each in outcomes])


def metric(tokenizer: Any, tasks: Sequence[Task], **options: Any) -> Callable[[nn.Module], float]:
    """pass@1 as early stopping wants it: from a model to a number. Raises UsageError where programs cannot be run."""
    run_programs(["pass"])
    return lambda model: pass_rate(model, tokenizer, tasks, **options).share


def continue_prompts(
    model: nn.Module, tokenizer: Any, tasks: Sequence[Task], max_new_tokens: int, *, together: bool = False
) -> list[str]:
    """What the model writes after each task's prompt, up to a stop of its own."""
    ids, mask = _left_padded([_encoded(tokenizer, task.asked) for task in tasks], tokenizer.eos_token_id or 0)
    device = device_of(model)
    longest = getattr(cast(Any, model).config, "max_position_embeddings", None)
    room = max_new_tokens if longest is None else min(max_new_tokens, longest - ids.shape[1])
    if room < 1:
        raise UsageError(f"A prompt has {ids.shape[1]} tokens and the model knows {longest}; leave that task out.")
    stop = _Stop(tokenizer, [task.stops for task in tasks], ids.shape[1])
    written = cast(Any, model).generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=room,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        stopping_criteria=StoppingCriteriaList([stop]),
        # A rounding may end a text sooner on one rank than on another, whose passes need all of them.
        synced_gpus=together,
    )
    texts: list[str] = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def _encoded(tokenizer: Any, prompt: str) -> list[int]:
    """With the token that begins a text, where the tokenizer has one and does not put it there itself."""
    ids = tokenizer(prompt)["input_ids"]
    begin = tokenizer.bos_token_id
    return ids if begin is None or ids[:1] == [begin] else [begin, *ids]


def _left_padded(prompts: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, [N, longest]."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[padding] * (longest - len(each)) + each for each in prompts])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
    return ids, mask


class _Stop(StoppingCriteria):
    """Ends a row at a stop of its task, of which the lines' ends that a row begins with are no part."""

    def __init__(self, tokenizer: Any, stops: Sequence[Sequence[str]], start: int) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._begins = [start] * len(stops)
        self._done = [False] * len(stops)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        length = input_ids.shape[1]
        starts = [max(begin, length - TAIL) for begin in self._begins]
        tails = self._tokenizer.batch_decode([ids[start:] for ids, start in zip(input_ids, starts, strict=True)])
        for row, (tail, stops) in enumerate(zip(tails, self._stops, strict=True)):
            if starts[row] == self._begins[row]:
                tail = tail.lstrip("\n")
                if not tail:
                    self._begins[row] = length
            self._done[row] = self._done[row] or any(stop in tail for stop in stops)
        return torch.tensor(self._done, device=input_ids.device)
