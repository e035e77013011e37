"""All splits of the same GPUs over expert and tensor parallelism, with the same tokens a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from farskip_fused.errors import UsageError
from farskip_fused.plan.job import Job
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


def sweep(job: Job, swept: Iterable[str] = SWEPT) -> Sweep:
    """Predict every split of the job's GPUs over powers of two of what is swept.

    A replica of ``tp`` GPUs gets ``tp`` times the sequences of one GPU, so that tokens a GPU stay the same.
    Raises UsageError if no split is possible, with the reason of the last.
    """
    swept, found, refused = set(swept), [], {}
    tps = _powers(job.gpus) if "tp" in swept else [job.tp]
    eps = _powers(min(job.gpus, job.sizes.experts)) if "ep" in swept else [job.ep]
    for tp in tps:
        for ep in eps:
            batch = job.batch * tp / job.tp
            try:
                if batch != int(batch):
                    raise UsageError(f"batch {job.batch} of TP {job.tp} is no whole number for TP {tp}.")
                if job.gpus % tp:
                    raise UsageError(f"{job.gpus} GPUs do not divide over TP {tp}.")
                found.append(predict(replace(job, ep=ep, tp=tp, dp=job.gpus // tp, batch=int(batch))))
            except UsageError as error:
                refused[ep, tp] = str(error)
    if not found:
        raise UsageError(f"No split of {job.gpus} GPUs is possible: {next(reversed(refused.values()))}")
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
