"""Where tests of several ranks run, as values of ``device`` for run_ranks: processes on CPU, side by side on one GPU,
and a GPU a rank, of which there must be as many as the test's parameter ``world`` says, 2 if it has none.
"""

import pytest

RUNGS = [
    pytest.param("cpu", marks=pytest.mark.rung2),
    pytest.param("cuda:0", marks=pytest.mark.rung3),
    pytest.param("cuda", marks=pytest.mark.rung4),
]
GPU_RUNGS = RUNGS[1:]
# For what takes the interpreter long and proves there little that another test does not.
CPU_IN_FULL = [pytest.param("cpu", marks=(pytest.mark.rung2, pytest.mark.full)), *GPU_RUNGS]


def rotated(gpus: str, lane: int) -> str:
    """The GPUs of CUDA_VISIBLE_DEVICES for one of several lanes of tests (pytest -n): pairs take turns to be first."""
    names = gpus.split(",")
    first = 2 * lane % len(names)
    return ",".join(names[first:] + names[:first])
