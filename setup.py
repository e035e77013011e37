"""What pyproject.toml cannot say: kernels/ and bench/ become packages of farskip_fused, csrc/ farskip_fused._C.

The extension is optional. Without pybind11 or a C++ compiler the package installs without it, without nvcc it has its
CPU part alone; ``farskip doctor`` says which. FARSKIP_BUILD_CUDA=1 demands the CUDA part, =0 leaves it out.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

CUDA_WISH = os.environ.get("FARSKIP_BUILD_CUDA", "")
ARCHITECTURES = ("80", "90", "100")


def extensions() -> list[Extension]:
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        print("pybind11 is not installed: building without farskip_fused._C.", file=sys.stderr)
        return []
    extension = Pybind11Extension(
        "farskip_fused._C",
        ["csrc/driver.cpp", "csrc/launch.cpp", "csrc/module.cpp", "csrc/status.cpp"],
        depends=["csrc/device.cu", *(f"csrc/{name}.h" for name in ("device", "driver", "launch", "layout", "status"))],
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra"],
        libraries=["dl"],
        optional=CUDA_WISH != "1",
    )
    return [extension]


def find_nvcc() -> Path | None:
    if CUDA_WISH not in ("", "0", "1"):
        raise SystemExit(
            f"FARSKIP_BUILD_CUDA is {CUDA_WISH!r}; use 0 or 1, or leave it unset to build what is possible."
        )
    if CUDA_WISH == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if found is None and CUDA_WISH == "1":
        raise SystemExit("FARSKIP_BUILD_CUDA is 1 and there is no nvcc; install the CUDA toolkit or set CUDA_HOME.")
    return Path(found).resolve() if found else None


class BuildExtension(build_ext):
    """Adds the CUDA part where there is an nvcc that works."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        if nvcc is not None:
            try:
                return super().build_extension(self.with_cuda(ext, nvcc))
            except (subprocess.CalledProcessError, CompileError, LinkError) as error:
                if CUDA_WISH == "1":
                    raise SystemExit(f"The CUDA part cannot be built: {error}") from error
                print(f"Building farskip_fused._C without its CUDA part: {error}", file=sys.stderr)
        return super().build_extension(ext)

    def with_cuda(self, ext: Extension, nvcc: Path) -> Extension:
        """The extension with device.cu compiled into it.

        The CUDA runtime is linked statically, so that the module can be imported where there is no CUDA.
        """
        extended = copy.copy(ext)
        extended.extra_objects = [self.compile_device_code(nvcc)]
        extended.define_macros = [*ext.define_macros, ("FARSKIP_CUDA", "1")]
        folders = [nvcc.parents[1] / name for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
        extended.library_dirs = [*ext.library_dirs, *(str(folder) for folder in folders if folder.is_dir())]
        extended.libraries = [*ext.libraries, "cudart_static", "rt", "pthread"]
        return extended

    def compile_device_code(self, nvcc: Path) -> str:
        codes = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
        known = [architecture for architecture in ARCHITECTURES if f"sm_{architecture}" in codes]
        target = Path(self.build_temp) / "device.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [str(nvcc), "-c", "csrc/device.cu", "-o", str(target), "-O3", "-std=c++17", "-Xcompiler=-fPIC"]
        command += [f"-gencode=arch=compute_{one},code=sm_{one}" for one in known]
        # The newest also as PTX, for GPUs that come later.
        command += [f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}", f"--threads={len(known) + 1}"]
        print(" ".join(command))
        subprocess.run(command, check=True)
        return str(target)


ROOMS = ("kernels", "bench")
setup(
    packages=sorted(
        {*find_packages(include=["farskip_fused", "farskip_fused.*"]), *(f"farskip_fused.{room}" for room in ROOMS)}
    ),
    package_dir={f"farskip_fused.{room}": room for room in ROOMS},
    package_data={"farskip_fused": ["py.typed", "*.pyi", "tuned.json"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
)
