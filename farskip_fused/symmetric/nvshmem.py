"""GPUs: NVSHMEM's symmetric heap, bootstrapped over a torch.distributed group.

Several processing elements may share one GPU, under CUDA MPS; without MPS their kernels take turns, which is correct
and slow. Every peer must be reachable by load and store.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from farskip_fused.errors import UsageError
from farskip_fused.symmetric.interface import SymmetricBuffer, SymmetricMemory

_open = False


class NvshmemMemory(SymmetricMemory):
    backend = "nvshmem"

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: float) -> None:
        global _open
        if _open:
            raise UsageError("NVSHMEM is open in this process already; use that symmetric memory or close it first.")
        try:
            import nvshmem.core as nvshmem
            from cuda.core import Device
        except ImportError as error:
            raise UsageError(
                f"The backend 'nvshmem' needs nvshmem4py ({error}); run: pip install 'farskip-fused[nvshmem-cu13]'."
            ) from error
        self.group = group
        super().__init__(dist.get_rank(group), dist.get_world_size(group), device, timeout)
        # Inside a node no network card is touched; multicast objects cannot be bound twice on a shared GPU.
        os.environ.setdefault("NVSHMEM_REMOTE_TRANSPORT", "none")
        os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")
        torch.cuda.set_device(device)
        cuda_device = Device(device.index)
        cuda_device.set_current()
        unique_id = nvshmem.get_unique_id(empty=self.rank != 0)
        box = [unique_id._data.tobytes() if self.rank == 0 else None]
        dist.broadcast_object_list(box, group=group, group_src=0)
        if self.rank != 0:
            import numpy

            flat = numpy.frombuffer(box[0], dtype=numpy.int8)  # type: ignore[arg-type]
            unique_id._data.view(numpy.int8)[:] = flat
        nvshmem.init(device=cuda_device, uid=unique_id, rank=self.rank, nranks=self.world, initializer_method="uid")
        _open = True
        self._library = nvshmem
        self._tensors: list[Any] = []

    def allocate(self, nbytes: int) -> SymmetricBuffer:
        from nvshmem.core.interop import torch as symmetric

        memory = symmetric.tensor((nbytes,), dtype=torch.uint8)
        self._tensors.append(memory)
        addresses = []
        for peer in range(self.world):
            if peer == self.rank:
                addresses.append(memory.data_ptr())
                continue
            try:
                addresses.append(symmetric.get_peer_tensor(memory, peer).data_ptr())
            except self._library.NvshmemError as error:
                raise UsageError(
                    f"Rank {self.rank} cannot reach rank {peer} by load and store ({error}); this version serves "
                    "ranks of one NVLink domain or one GPU."
                ) from error
        memory.zero_()
        torch.cuda.synchronize(self.device)
        self.barrier()
        return SymmetricBuffer(memory, addresses)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def close(self) -> None:
        global _open
        torch.cuda.synchronize(self.device)
        self.barrier()
        self.buffers.clear()
        from nvshmem.core.interop import torch as symmetric

        for tensor in self._tensors:
            symmetric.free_tensor(tensor)
        self._tensors.clear()
        self._library.finalize()
        _open = False
