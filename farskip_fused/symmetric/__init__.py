"""Symmetric memory: one interface, three backends.

local   one rank, any device
shm     processes of one machine on CPU, POSIX shared memory
nvshmem GPUs, NVSHMEM's symmetric heap
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from farskip_fused.errors import UsageError
from farskip_fused.symmetric.interface import SymmetricBuffer, SymmetricMemory

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["BACKENDS", "SymmetricBuffer", "SymmetricMemory", "init"]

BACKENDS = ("local", "shm", "nvshmem")


def init(
    group: dist.ProcessGroup | None = None,
    *,
    backend: str | None = None,
    device: torch.device | str | None = None,
    timeout: float = 60.0,
    by_put: bool = False,
) -> SymmetricMemory:
    """Open symmetric memory among the ranks of ``group``; collective.

    group: a torch.distributed group, by default the whole world; one rank if torch.distributed is not initialised.
    backend: one of ``BACKENDS``; by default ``local`` for one rank, otherwise ``nvshmem`` on GPUs and ``shm`` on CPUs.
    device: by default the current GPU, or the CPU where there is none.
    timeout: seconds after which any wait for a peer ends in ``PeerTimeout``.
    by_put: reach every peer by puts, as those are that no load or store reaches; for tests.
    Raises UsageError for an unknown backend, or one that does not fit the device or the number of ranks.
    """
    import torch.distributed as dist

    if timeout <= 0:
        raise UsageError(f"The timeout of symmetric memory is {timeout} s; it must be above 0.")
    where = _resolve_device(device)
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    world = 1 if group is None else dist.get_world_size(group)
    if backend is None:
        backend = "local" if world == 1 else "nvshmem" if where.type == "cuda" else "shm"
    if backend == "local":
        if world != 1:
            raise UsageError(f"The backend 'local' serves one rank, the group has {world}; use 'shm' or 'nvshmem'.")
        from farskip_fused.symmetric.local import LocalMemory

        return LocalMemory(where, timeout)
    if backend not in BACKENDS:
        raise UsageError(f"Unknown symmetric-memory backend {backend!r}; use one of {', '.join(BACKENDS)}.")
    if group is None:
        raise UsageError(f"The backend {backend!r} needs torch.distributed; call init_process_group first.")
    needed = "cpu" if backend == "shm" else "cuda"
    if where.type != needed:
        raise UsageError(f"The backend {backend!r} works on {needed} devices and {where} was given.")
    if backend == "shm":
        from farskip_fused.symmetric.shm import SharedMemory

        return SharedMemory(group, timeout, by_put)
    from farskip_fused.symmetric.nvshmem import NvshmemMemory

    return NvshmemMemory(group, where, timeout, by_put)


def _resolve_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    return where
