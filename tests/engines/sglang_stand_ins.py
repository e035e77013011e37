"""What SGLang imports and its environment for tests lacks; imported before SGLang in each of its processes.

No wheel of its kernels for CPUs is published, torchvision there is built for GPUs, and its attention in torch does not
know the two forms of latent attention.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class _Kernels(ModuleType):
    """``sgl_kernel``: names that SGLang imports on CPU; of those only what is defined here can be called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.endswith("_cpu"):
            raise AttributeError(name)

        def absent(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"sgl_kernel.{name} has no stand-in")

        return absent

    @staticmethod
    def assign_req_to_token_pool_cpu(
        requests: Tensor, table: Tensor, starts: Tensor, ends: Tensor, locations: Tensor, width: int
    ) -> None:
        """Writes into each request's row of ``table``, from its start to its end, the next of ``locations``."""
        used = 0
        for request, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
            table[request, start:end] = locations[used : used + end - start]
            used += end - start


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True)
            if name in ("sgl_kernel", "sgl_kernel.mamba")
            else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Kernels(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.append(_Finder())

try:
    import torchvision  # noqa: F401
except RuntimeError:  # its operators do not load with this torch, and it describes two of them regardless
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def run_scheduler(*args: Any, **kwargs: Any) -> Any:
    """SGLang's scheduler process, with latent attention always in its absorbed form."""
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry, AttnForwardMethod

    AttentionBackendRegistry.register("torch_native", lambda attention, batch: AttnForwardMethod.MLA)
    return run_scheduler_process(*args, **kwargs)
