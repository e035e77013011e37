"""Start several ranks on this machine, each with symmetric memory; for tests, benchmarks and the demo.

On CPU the ranks are processes over shared memory. On GPUs they are NVSHMEM processing elements: one a GPU where there
are enough; otherwise, or where one GPU is named, side by side on one under a private MPS daemon, each with its share of
the SMs.
Training and serving start their ranks with torchrun or the engine instead, and call ``farskip_fused.init``.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any, cast

from farskip_fused import mps

# torch._dynamo is what the first call of any operator of torch.library imports.
PRELOADED = ["torch._dynamo", "torch.distributed", "farskip_fused.moe"]


class RankFailed(RuntimeError):
    """A rank raised or died; the message holds its traceback or exit code."""


@dataclass(frozen=True)
class Outcome:
    """What became of a rank: its result, or its error and traceback; both None if it died without a word."""

    result: Any = None
    error: str | None = None
    traceback: str | None = None
    finished: bool = False


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    device: str = "cpu",
    limit: float = 300.0,
    wait_timeout: float = 60.0,
    by_put: bool = False,
    symmetric: bool = True,
    may_fail: bool = False,
) -> list[Any]:
    """Call ``function(memory, *args)`` on ``world`` ranks and return their results in order.

    device: "cpu"; "cuda" for one GPU a rank where there are enough, otherwise side by side on GPU 0; or such as
        "cuda:0" for side by side on that GPU even so.
    limit: seconds after which the ranks are killed. wait_timeout, by_put: see ``init``.
    symmetric: False to open no symmetric memory: the function is called with its rank's torch.device in its place.
    may_fail: return the ``Outcome`` of each rank, also of one that failed.
    function and args must be picklable (a function of a module). Ranks on CPU see the environment variables that were
    set when the first such ranks of this process started. Raises RankFailed if a rank does not return.
    """
    context = _context(device)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="farskip-ranks-")))
        environment = _environment(world, device, stack)
        processes, pipes = [], []
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(
                    rank, world, str(folder / "store"), device, wait_timeout, by_put, symmetric, sender, function, args,
                ),
            )  # fmt: skip
            # Inherited, not set by the child: unpickling the function may import what asks the driver for its devices,
            # and from then on MPS is not looked for.
            with _environ(environment):
                process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        deadline = time.monotonic() + limit
        try:
            outcomes = [_outcome(pipe, deadline) for pipe in pipes]
        finally:
            for process in processes:
                process.join(timeout=max(0.0, min(10.0, deadline - time.monotonic())))
                if process.is_alive():
                    process.kill()
                    process.join()
    if may_fail:
        return outcomes
    # An error first: the ranks that wait for one that raised are killed.
    for rank, outcome in enumerate(outcomes):
        if outcome.error is not None:
            raise RankFailed(f"Rank {rank} of {world} raised {outcome.error}\n{outcome.traceback}")
    for rank, outcome in enumerate(outcomes):
        if not outcome.finished:
            raise RankFailed(f"Rank {rank} of {world} died or was still running after {limit:g} s.")
    return [outcome.result for outcome in outcomes]


def _context(device: str) -> SpawnContext | ForkServerContext:
    """How ranks are started: on CPU forked from a server that has imported what takes longer than most of them run."""
    if device != "cpu":
        # CUDA is not to be forked, and MPS's variables must be there before anything is imported.
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _outcome(pipe: Any, deadline: float) -> Outcome:
    try:
        if pipe.poll(max(0.0, deadline - time.monotonic())):
            return cast(Outcome, pickle.loads(pipe.recv_bytes()))
    except EOFError:
        pass
    return Outcome()


def _environment(world: int, device: str, stack: ExitStack) -> dict[str, str]:
    if device == "cpu" or len({gpu_of(rank, world, device) for rank in range(world)}) == world:
        return {}
    return {
        **stack.enter_context(mps.private_daemon()),
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(mps.percentage(world)),
    }


def gpu_of(rank: int, world: int, device: str) -> int:
    """Which GPU a rank takes."""
    import torch

    index = torch.device(device).index
    if index is not None:
        return index
    return rank if world <= torch.cuda.device_count() else 0


def multiprocessors_of_rank(world: int) -> int:
    """How many a rank on "cuda" has: all of its own GPU, or its share of GPU 0."""
    import torch

    of_gpu = torch.cuda.get_device_properties(0).multi_processor_count
    return of_gpu if world <= torch.cuda.device_count() else mps.multiprocessors(of_gpu, world)


@contextmanager
def _environ(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _rank_main(
    rank: int,
    world: int,
    store: str,
    device: str,
    wait_timeout: float,
    by_put: bool,
    symmetric: bool,
    pipe: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    import farskip_fused as ff

    try:
        torch.set_num_threads(1)  # as torchrun does: ranks of a host would take each other's processors
        if device == "cpu":
            where = torch.device(device)
        else:
            where = torch.device("cuda", gpu_of(rank, world, device))
            torch.cuda.set_device(where)
        rendezvous = dist.FileStore(store, world)
        dist.init_process_group("gloo", store=rendezvous, rank=rank, world_size=world)
        # A rank whose function returns or raises at once would otherwise be gone while others still connect to it,
        # and their failure to connect would hide its own error.
        rendezvous.set(f"connected {rank}", "")
        rendezvous.wait([f"connected {peer}" for peer in range(world)])
        memory = ff.init(device=where, timeout=wait_timeout, by_put=by_put) if symmetric else None
        _tell(pipe, Outcome(result=function(where if memory is None else memory, *args), finished=True))
        if memory is not None and memory.status.read() is None:  # after a lost peer, closing would wait for it again
            memory.close()
    except BaseException as error:
        _tell(pipe, Outcome(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc(), finished=True))
    pipe.close()
    # Interpreters that tear down CUDA, NVSHMEM and gloo in arbitrary order may hang, and nothing is left to do.
    os._exit(0)


def _tell(pipe: Any, outcome: Outcome) -> None:
    """By value: ``pipe.send`` has tensors fetched from this process, as torch registers, and it is gone by then."""
    pipe.send_bytes(pickle.dumps(outcome))
