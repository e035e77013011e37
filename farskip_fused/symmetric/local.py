"""The world of one: ordinary memory, the peer table is the identity."""

from __future__ import annotations

from typing import Any

import torch

from farskip_fused.symmetric.interface import SymmetricBuffer, SymmetricMemory


class LocalMemory(SymmetricMemory):
    backend = "local"

    def __init__(self, device: torch.device, timeout: float) -> None:
        super().__init__(0, 1, device, timeout)

    def allocate(self, nbytes: int) -> SymmetricBuffer:
        memory = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        return SymmetricBuffer(memory, [memory.data_ptr()])

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        self.buffers.clear()
