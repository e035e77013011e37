"""Skips tests of a rung that this machine does not reach, with the reason; keeps every test off the network and on one
thread.
"""

from __future__ import annotations

import os
from functools import cache

# Before transformers, matplotlib or tokenizers are imported.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false")

import importlib.util

import pytest

from farskip_fused.doctor.facts import mps_state
from tests.rungs import rotated

# Before torch asks the driver. Ranks take the first GPUs that they see, so all lanes would be on the same ones.
if os.environ.get("CUDA_VISIBLE_DEVICES") and "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = rotated(
        os.environ["CUDA_VISIBLE_DEVICES"], int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    )


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The models and layers of tests are slower on several threads, by far where cores are shared."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched since the test began."""
    from farskip_fused.kernels.launchable import Kernel

    names: list[str] = []
    launch, bind = Kernel.__getitem__, Kernel.of_one_form

    def noted(kernel, launch_it):
        return lambda *arguments, **named: names.append(kernel.function.fn.__name__) or launch_it(*arguments, **named)

    monkeypatch.setattr(Kernel, "__getitem__", lambda kernel, grid: noted(kernel, launch(kernel, grid)))
    monkeypatch.setattr(Kernel, "of_one_form", lambda kernel, **constants: noted(kernel, bind(kernel, **constants)))
    return names


@cache
def missing_for(mark: str, world: int) -> str | None:
    """What this machine lacks for tests of that mark with so many ranks, or None."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if mark == "rung2":
        return "needs a process that sees no GPU: set CUDA_VISIBLE_DEVICES to nothing" if gpus else None
    wanted = world if mark == "rung4" else 1
    if gpus < wanted:
        return f"needs {wanted} CUDA GPU{'s' if wanted > 1 else ''}, there {'is' if gpus == 1 else 'are'} {gpus}"
    if mark != "gpu" and importlib.util.find_spec("nvshmem") is None:
        return "needs nvshmem4py: pip install 'farskip-fused[nvshmem-cu13]'"
    if mark == "rung3" and mps_state() == "missing":
        return "needs CUDA MPS: nvidia-cuda-mps-control is not on the PATH"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    world = item.callspec.params.get("world", 2) if hasattr(item, "callspec") else 2
    for mark in ("gpu", "rung2", "rung3", "rung4"):
        reason = missing_for(mark, world) if item.get_closest_marker(mark) else None
        if reason:
            pytest.skip(f"{mark} {reason}")
