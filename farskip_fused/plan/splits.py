"""All splits of the same GPUs over expert and tensor parallelism, with the same tokens a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from farskip_fused.errors import UsageError
from farskip_fused.plan.job import Job
from farskip_fused.plan.models import find_model
from farskip_fused.plan.prediction import Prediction, predict

SWEPT = ("ep", "tp")


@dataclass(frozen=True)
class Sweep:
    """predictions: of the splits that are possible, fastest first. refused: the other splits, and why."""

    predictions: list[Prediction]
    refused: dict[tuple[int, int], str]

    def best(self, name: str) -> Prediction:
        """The split with the fastest step: name is "blocking", "standard" or "farskip".

        All splits have the same tokens a GPU, so that steps compare by their tokens a second."""
        return min(self.predictions, key=lambda one: one.step[name] / one.job.replica_tokens * one.job.tp)

    def to_dict(self) -> dict[str, Any]:
        return {
            "predictions": [one.to_dict() for one in self.predictions],
            "refused": [{"ep": ep, "tp": tp, "why": why} for (ep, tp), why in self.refused.items()],
        }


def parse_swept(text: str) -> tuple[str, ...]:
    """ "ep,tp", "ep" or "tp"; anything else raises UsageError."""
    names = tuple(part.strip() for part in text.split(","))
    if not set(names) <= set(SWEPT) or len(set(names)) != len(names):
        raise UsageError(f"--sweep {text!r}; use {' or '.join([*SWEPT, ','.join(SWEPT)])}.")
    return names


def sweep(job: Job | Mapping[str, Any], swept: Iterable[str] = SWEPT) -> Sweep:
    """Predict every split of the job's GPUs over powers of two of what is swept.

    job: a job, or the arguments of one whose own split need not be possible. A replica of ``tp`` GPUs gets ``tp``
    times the sequences of one GPU, so that tokens a GPU stay the same.
    Raises UsageError if no split is possible, with the reason of the last.
    """
    given = {field.name: getattr(job, field.name) for field in fields(Job)} if isinstance(job, Job) else dict(job)
    defaults = {field.name: field.default for field in fields(Job)}
    ep, tp, batch = (int(given.get(name, defaults[name])) for name in ("ep", "tp", "batch"))
    gpus = tp * (given.get("dp") or max(1, -(-ep // tp)))
    swept, found = set(swept), []
    refused: dict[tuple[int, int], str] = {}
    eps = _powers(min(gpus, find_model(given["model"]).experts)) if "ep" in swept else [ep]
    for tried_tp, tried_ep in product(_powers(gpus) if "tp" in swept else [tp], eps):
        try:
            if batch * tried_tp % tp:
                raise UsageError(f"batch {batch} of TP {tp} is no whole number for TP {tried_tp}.")
            if gpus % tried_tp:
                raise UsageError(f"{gpus} GPUs do not divide over TP {tried_tp}.")
            split = {"ep": tried_ep, "tp": tried_tp, "dp": gpus // tried_tp, "batch": batch * tried_tp // tp}
            found.append(predict(Job(**{**given, **split})))
        except UsageError as error:
            refused[tried_ep, tried_tp] = str(error)
    if not found:
        raise UsageError(f"No split of {gpus} GPUs is possible: {next(reversed(refused.values()))}")
    found.sort(key=lambda one: -one.tokens_per_second)
    return Sweep(found, refused)


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def frontier(predictions: Sequence[Prediction], name: str) -> list[tuple[int, float]]:
    """(EP, tokens a second and GPU of the best TP), by EP; name as in ``Sweep.best``."""
    best: dict[int, float] = {}
    for one in predictions:
        rate = one.tokens_per_second * one.step["farskip"] / one.step[name]
        best[one.job.ep] = max(best.get(one.job.ep, 0.0), rate)
    return sorted(best.items())
