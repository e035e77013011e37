"""Processes of one machine on CPU: every rank maps every rank's POSIX shared memory."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from farskip_fused.errors import UsageError
from farskip_fused.symmetric.interface import GroupMemory, SymmetricBuffer

DIRECTORY = Path("/dev/shm")


class SharedMemory(GroupMemory):
    backend = "shm"

    def __init__(self, group: dist.ProcessGroup, timeout: float, by_put: bool) -> None:
        super().__init__(group, torch.device("cpu"), timeout)
        # Mappings of the peers live as long as the memory itself; kernels know them by address only.
        self._mapped: list[torch.UntypedStorage] = []
        self._reach_by_put(set(range(self.world)) - {self.rank} if by_put else set(), {})

    def allocate(self, nbytes: int) -> SymmetricBuffer:
        free = os.statvfs(DIRECTORY)
        if nbytes * self.world > free.f_bavail * free.f_frsize:
            raise UsageError(
                f"{self.world} ranks need {nbytes * self.world} bytes of shared memory and {DIRECTORY} has "
                f"{free.f_bavail * free.f_frsize} left; lower max_tokens or enlarge {DIRECTORY}."
            )
        path = DIRECTORY / f"farskip-{uuid.uuid4().hex}"
        own = _map(path, nbytes)
        try:
            paths = self.gather(path)
            storages = [own if rank == self.rank else _map(peer, nbytes) for rank, peer in enumerate(paths)]
            self.barrier()
        finally:
            # Nothing is left behind, whoever is killed later: the mappings keep the memory alive without its name.
            path.unlink()
        self._mapped += storages
        memory = torch.empty(0, dtype=torch.uint8, device="cpu").set_(own)
        return SymmetricBuffer(memory, [storage.data_ptr() for storage in storages])

    def close(self) -> None:
        self.buffers.clear()
        self._mapped.clear()


def _map(path: Path, nbytes: int) -> torch.UntypedStorage:
    """The file's bytes, shared; a new file is all zeros."""
    return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(path), True, nbytes))
