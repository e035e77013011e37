"""Runs programs that a model wrote, each in a process that can read and compute and nothing else.

The process forbids itself, by a seccomp filter of the kernel: sockets, further processes, signals to others and changes
of their limits and priorities, opening files to write, and whatever else changes the file system. Its memory, file
sizes and processor time are limited, its environment is empty, and after the time limit it is killed.
"""

from __future__ import annotations

import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from farskip_fused.errors import UsageError

SECONDS = 5.0
MEMORY = 2**30
# What the process says if it cannot lock itself in.
NO_SANDBOX = 77


@dataclass(frozen=True)
class Outcome:
    """passed: whether the program ran to its end; error: the last line of its traceback, or why it was stopped."""

    passed: bool
    error: str = ""


def run_programs(
    programs: Sequence[str],
    *,
    seconds: float = SECONDS,
) -> list[Outcome]:
    """Runs Python programs, as many at a time as there are cores; a program passes if it ends without an exception.

    seconds: of wall and of processor time for each; of address space each has ``MEMORY`` bytes. Raises UsageError where
    the kernel offers no seccomp filters.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UsageError(f"Programs are only run on Linux x86-64, not on {sys.platform} {platform.machine()}.")

    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory(prefix="farskip-sandbox-") as place, pool:
        return list(pool.map(lambda program: _run(program, place, seconds), programs))


def _run(program: str, place: str, seconds: float) -> Outcome:
    word = secrets.token_hex(16)
    command = [
        sys.executable,
        "-I",
        "-S",
        "-B",
        str(Path(__file__).with_name("locked_in.py")),
        word,
        f"{seconds}",
        f"{MEMORY}",
    ]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=place,
        env={},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(program.encode(errors="surrogateescape"), timeout=seconds + 1)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Outcome(False, f"stopped after {seconds:g} s")
    if process.returncode == NO_SANDBOX:
        raise UsageError(
            f"The kernel does not let a process lock itself in ({err.decode().strip()}); run it elsewhere."
        )
    # A program that ends itself early has not passed.
    if process.returncode == 0 and out == word.encode():
        return Outcome(True)
    said = err.decode(errors="replace").strip().splitlines()
    return Outcome(False, said[-1] if said else f"ended with code {process.returncode}")
