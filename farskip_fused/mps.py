"""CUDA MPS: kernels of several processes side by side on one GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

CONTROL = "nvidia-cuda-mps-control"


def percentage(clients: int) -> int:
    """Of the multiprocessors for each of so many clients, as CUDA_MPS_ACTIVE_THREAD_PERCENTAGE takes it."""
    return 100 // clients


def multiprocessors(of_gpu: int, clients: int) -> int:
    """What a client with that percentage sees: MPS grants pairs, rounded down (66, 32 and 14 of 132 for 2, 4 and 8)."""
    return of_gpu * percentage(clients) // 200 * 2


@contextmanager
def private_daemon() -> Iterator[dict[str, str]]:
    """Run an MPS daemon in a directory of its own; yields the environment that its clients need.

    A daemon of the user's is left alone: if CUDA_MPS_PIPE_DIRECTORY is set, that one is used.
    Raises OSError with the reason if no daemon can be started.
    """
    existing = os.environ.get("CUDA_MPS_PIPE_DIRECTORY")
    if existing:
        yield {"CUDA_MPS_PIPE_DIRECTORY": existing}
        return
    if shutil.which(CONTROL) is None:
        raise OSError(f"{CONTROL} is not installed")
    with tempfile.TemporaryDirectory(prefix="farskip-mps-") as pipes:
        environment = {"CUDA_MPS_PIPE_DIRECTORY": pipes, "CUDA_MPS_LOG_DIRECTORY": pipes}
        merged = {**os.environ, **environment}
        started = subprocess.run([CONTROL, "-d"], env=merged, capture_output=True, text=True, timeout=30)
        if started.returncode != 0:
            raise OSError(f"{CONTROL} -d: {started.stderr.strip() or started.stdout.strip() or started.returncode}")
        try:
            yield environment
        finally:
            subprocess.run([CONTROL], input="quit\n", env=merged, capture_output=True, text=True, timeout=30)
