"""GPUs: NVSHMEM's symmetric heap, bootstrapped over a torch.distributed group.

Several processing elements may share one GPU, under CUDA MPS; without MPS their kernels take turns, which is correct
and slow. Peers of one node are reached by load and store, others by NVSHMEM's puts from inside kernels.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from triton import knobs

from farskip_fused.errors import UsageError
from farskip_fused.symmetric.interface import GroupMemory, SymmetricBuffer

ALIGNMENT = 256

_open = False


class NvshmemMemory(GroupMemory):
    backend = "nvshmem"

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: float, by_put: bool) -> None:
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
        super().__init__(group, device, timeout)
        # Inside a node no network card is touched, and a proxy thread would keep a processor of each rank busy for what
        # is not used here: waits and exits that a kernel asks the host for.
        if len(set(self.gather(socket.gethostname()))) == 1:
            os.environ.setdefault("NVSHMEM_REMOTE_TRANSPORT", "none")
            os.environ.setdefault("NVSHMEM_DISABLE_LOCAL_ONLY_PROXY", "1")
        # Multicast objects cannot be bound twice on a shared GPU.
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
        addresses = self.allocate(ALIGNMENT).addresses
        others = set(range(self.world)) - {self.rank}
        put_to = others if by_put else {peer for peer in others if addresses[peer] == 0}
        launch = {"extern_libs": (("libnvshmem_device", _device_library(device)),)} if put_to else {}
        if put_to:
            knobs.runtime.kernel_load_end_hook.add(_initialise_module)
        self._reach_by_put(put_to, launch)

    def allocate(self, nbytes: int) -> SymmetricBuffer:
        from nvshmem.core.interop import torch as symmetric

        memory = symmetric.tensor((nbytes,), dtype=torch.uint8)
        self._tensors.append(memory)
        addresses = []
        for peer in range(self.world):
            try:
                at_peer = memory if peer == self.rank else symmetric.get_peer_tensor(memory, peer)
                addresses.append(at_peer.data_ptr())
            except self._library.NvshmemError:  # no load or store reaches it
                addresses.append(0)
        memory.zero_()
        torch.cuda.synchronize(self.device)
        self.barrier()
        return SymmetricBuffer(memory, addresses)

    def close(self) -> None:
        global _open
        torch.cuda.synchronize(self.device)
        self.barrier()
        self.buffers.clear()
        from nvshmem.core.interop import torch as symmetric

        for tensor in self._tensors:
            symmetric.free_tensor(tensor)
        self._tensors.clear()
        if self.puts is not None:
            knobs.runtime.kernel_load_end_hook.remove(_initialise_module)
        self._library.finalize()
        _open = False


def _device_library(device: torch.device) -> str:
    """NVSHMEM's device functions as bitcode: for this architecture, or for all, as the wheel has it."""
    import nvidia.nvshmem

    major, minor = torch.cuda.get_device_capability(device)
    folder = Path(next(iter(nvidia.nvshmem.__path__))) / "lib"
    for name in (f"libnvshmem_device_sm_{major}{minor}.bc", "libnvshmem_device.bc"):
        if (folder / name).is_file():
            return str(folder / name)
    raise UsageError(
        f"Some peers are reached by NVSHMEM's puts only, and {folder} has no libnvshmem_device.bc for compute "
        f"capability {major}.{minor}; install nvidia-nvshmem-cu12 or -cu13."
    )


def _initialise_module(module: int, *_: Any) -> None:
    """Give a module that calls NVSHMEM its state; without it the first call is an illegal memory access."""
    from cuda.bindings import driver
    from nvshmem import bindings

    found, *_ = driver.cuModuleGetGlobal(driver.CUmodule(module), b"nvshmemi_device_state_d")
    if found == driver.CUresult.CUDA_SUCCESS:
        bindings.cumodule_init(module)
