"""What of the facts does not fit together, and the command that mends it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from packaging.version import Version

from farskip_fused.doctor.facts import DISTRIBUTION, Facts

# The interpreter of older Triton releases fails with NumPy 2.4, and their LLVM cannot read the bitcode of NVSHMEM 3.8.
INTERPRETER_TAKES_NUMPY_2_4 = Version("3.7")
READS_BITCODE_3_8 = Version("3.7")


@dataclass(frozen=True)
class Problem:
    """broken: something that should work does not; otherwise a part is missing that not everybody needs."""

    broken: bool
    what: str
    command: str


@dataclass(frozen=True)
class Report:
    facts: Facts
    problems: list[Problem]

    @property
    def usable(self) -> bool:
        return not any(problem.broken for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        return {"usable": self.usable, "problems": [asdict(one) for one in self.problems], "facts": asdict(self.facts)}


def judge(facts: Facts) -> list[Problem]:
    """Everything that is wrong with these facts, what is broken first."""
    problems = [*_installed(facts), *_requirements(facts), *_interpreter(facts), *_gpu(facts), *_nvshmem(facts)]
    problems += _extension(facts)
    return sorted(problems, key=lambda problem: not problem.broken)


def _installed(facts: Facts) -> Iterator[Problem]:
    if facts.package is None:
        yield Problem(True, "farskip-fused runs from its sources without being installed.", f"{facts.pip} install -e .")
    if facts.torch_error:
        yield Problem(
            True,
            f"torch {facts.versions['torch']} is installed and cannot be imported ({facts.torch_error}).",
            f"{facts.pip} install --force-reinstall torch=={_release(facts.versions['torch'])}",
        )
    hf = ("transformers", "accelerate", "safetensors", "tokenizers")
    missing = [name for name in hf if facts.versions[name] is None]
    if missing:
        yield Problem(
            False,
            f"Converting and distilling models needs {', '.join(missing)}.",
            _install(facts, "hf"),
        )


def _requirements(facts: Facts) -> Iterator[Problem]:
    for unmet in facts.unmet:
        found = f"{unmet.found} is installed" if unmet.found else "it is not installed"
        yield Problem(
            True,
            f"{unmet.distribution} needs {unmet.requirement} and {found}.",
            f"{facts.pip} install '{unmet.requirement}'",
        )


def _interpreter(facts: Facts) -> Iterator[Problem]:
    triton, numpy = facts.versions["triton"], facts.versions["numpy"]
    if facts.gpus or triton is None or numpy is None:
        return
    if Version(triton) < INTERPRETER_TAKES_NUMPY_2_4 and Version(numpy) >= Version("2.4"):
        yield Problem(
            True,
            f"Without a GPU kernels run in Triton's interpreter, and that of Triton {triton} fails with NumPy {numpy}.",
            f"{facts.pip} install 'numpy<2.4'",
        )


def _gpu(facts: Facts) -> Iterator[Problem]:
    if facts.versions["torch"] is None or facts.torch_error or not facts.driver_gpus:
        return
    names = ", ".join(sorted(set(facts.driver_gpus)))
    if facts.torch_cuda is None:
        yield Problem(
            True,
            f"There is a GPU ({names}) and torch {facts.versions['torch']} is a build without CUDA.",
            f"{facts.pip} uninstall -y torch && {facts.pip} install --no-cache-dir torch",
        )
    elif not facts.gpus:
        yield Problem(
            True,
            f"torch with CUDA {facts.torch_cuda} cannot use the GPU ({names}) with driver {facts.driver}: "
            "CUDA_VISIBLE_DEVICES hides it, or the driver is older than that CUDA needs.",
            "unset CUDA_VISIBLE_DEVICES && nvidia-smi",
        )
    elif len(facts.gpus) == 1 and facts.mps == "stopped":
        yield Problem(
            False,
            "No MPS daemon runs: several processing elements on this one GPU take turns instead of running together.",
            "nvidia-cuda-mps-control -d",
        )


def _nvshmem(facts: Facts) -> Iterator[Problem]:
    if not facts.gpus or facts.torch_cuda is None:
        return
    major = facts.torch_cuda.split(".")[0]
    other = "12" if major == "13" else "13"
    extra = _install(facts, f"nvshmem-cu{major}")
    if facts.versions.get(f"nvshmem4py-cu{major}") is None:
        wrong = facts.versions.get(f"nvshmem4py-cu{other}")
        if wrong:
            yield Problem(
                True,
                f"nvshmem4py-cu{other} {wrong} is for CUDA {other} and torch is built for CUDA {facts.torch_cuda}.",
                f"{facts.pip} uninstall -y nvshmem4py-cu{other} nvidia-nvshmem-cu{other} && {extra}",
            )
        else:
            yield Problem(False, "Expert parallelism over several GPUs needs nvshmem4py.", extra)
        return
    if facts.nvshmem_library is None:
        yield Problem(True, "nvshmem4py is installed and NVSHMEM's host library is not to be found.", extra)
    if not facts.bitcode:
        yield Problem(False, "NVSHMEM's bitcode for device calls (libnvshmem_device*.bc) is not to be found.", extra)
        return
    needed = facts.gpus[0].architecture
    suffixes = [found[1] for path in facts.bitcode if (found := re.search(r"_sm_(\d+)\.bc$", path))]
    if len(suffixes) == len(facts.bitcode) and needed not in suffixes:
        yield Problem(
            False,
            f"NVSHMEM's bitcode is for sm_{', sm_'.join(suffixes)} and the GPU is sm_{needed}.",
            f"{facts.pip} install --upgrade nvidia-nvshmem-cu{major}",
        )
    library, triton = facts.versions.get(f"nvidia-nvshmem-cu{major}"), facts.versions["triton"]
    if library and triton and Version(library) >= Version("3.8") and Version(triton) < READS_BITCODE_3_8:
        yield Problem(
            False,
            f"Triton {triton} cannot read the bitcode of NVSHMEM {library}: device calls will not compile.",
            f"{facts.pip} install 'nvidia-nvshmem-cu{major}<3.8'",
        )


def _extension(facts: Facts) -> Iterator[Problem]:
    if facts.extension == "missing":
        why = f" cannot be imported ({facts.extension_error})" if facts.extension_error else " was not built"
        tools = "" if facts.compiler else "apt-get install g++ && "
        yield Problem(True, f"The extension farskip_fused._C{why}.", tools + _reinstall(facts))
    elif facts.extension == "cpu" and facts.gpus:
        tools = "" if facts.nvcc else ", after the CUDA toolkit is installed"
        yield Problem(
            False,
            f"The extension has its CPU part alone: benchmarks cannot hold multiprocessors back{tools}.",
            f"FARSKIP_BUILD_CUDA=1 {_reinstall(facts)}",
        )


def _install(facts: Facts, extra: str) -> str:
    wanted = f"{facts.checkout or DISTRIBUTION}[{extra}]"
    return f"{facts.pip} install {'-e ' if facts.checkout else ''}{shlex.quote(wanted)}"


def _reinstall(facts: Facts) -> str:
    if facts.checkout:
        return f"{facts.pip} install --no-deps -e {shlex.quote(facts.checkout)}"
    return f"{facts.pip} install --no-deps --force-reinstall --no-cache-dir {DISTRIBUTION}"


def _release(version: str | None) -> str:
    return Version(version or "0").public
