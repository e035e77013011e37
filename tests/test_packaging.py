"""What is shipped: the source distribution, the wheel made from it, and the checkout as a place to work in."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "bench")  # top-level folders that are packages of farskip_fused when they are installed


def run(*command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source, folder, **environment):
    """Without the CUDA part, which takes nvcc longer than everything else."""
    flags = ("--no-deps", "--no-build-isolation", "--no-cache-dir")
    run(sys.executable, "-m", "pip", "wheel", *flags, "-w", folder, source, cwd=folder, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy: a build leaves its traces in the source folder."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("farskip_fused", "csrc", *ROOMS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def source(checkout, tmp_path_factory):
    """The source distribution."""
    folder = tmp_path_factory.mktemp("source")
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", program, cwd=checkout)
    (found,) = folder.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """Built from the source distribution, so that this one is complete as well."""
    return build_wheel(source, tmp_path_factory.mktemp("wheel"), FARSKIP_BUILD_CUDA="0")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def modules(folder, package):
    """Names that the Python files of a folder have in the wheel; what the folder links to is not its own."""
    files = [Path(where) / name for where, _, names in os.walk(folder) for name in names if name.endswith(".py")]
    return {f"{package}/{path.relative_to(folder).as_posix()}" for path in files}


def test_the_wheel_holds_the_rooms_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"farskip_fused"}
    packed = {name for name in names if name.endswith(".py")}
    expected = [modules(ROOT / room, f"farskip_fused/{room}") for room in ROOMS]
    assert packed == modules(ROOT / "farskip_fused", "farskip_fused").union(*expected)
    others = {name for name in names if not name.endswith(".py")}
    extension = {name for name in others if name.startswith("farskip_fused/_C.") and name.endswith(".so")}
    assert len(extension) == 1
    assert others - extension == {"farskip_fused/py.typed", "farskip_fused/_C.pyi", "farskip_fused/tuned.json"}


def test_source_and_wheel_have_the_same_valid_metadata(source, wheel):
    """Validated field by field, as an index does on upload."""
    with zipfile.ZipFile(wheel) as files:
        (path,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(files.read(path), validate=True)
        licences = [name for name in files.namelist() if name.endswith("licenses/LICENSE")]
        assert "Apache License" in files.read(licences[0]).decode()
    with tarfile.open(source) as files:
        root = source.name.removesuffix(".tar.gz")
        of_source = Metadata.from_email(files.extractfile(f"{root}/PKG-INFO").read(), validate=True)
        assert f"{root}/CHANGELOG.md" in files.getnames()
    assert of_source.requires_dist == metadata.requires_dist and of_source.version == metadata.version
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description.strip() == (ROOT / "README.md").read_text().strip()
    assert {"nvshmem-cu12", "nvshmem-cu13", "hf", "vllm", "dev"} <= set(metadata.provides_extra)
    required = {one.name for one in metadata.requires_dist if "extra ==" not in str(one.marker)}
    assert required == {"numpy", "packaging", "rich", "torch", "triton", "typer"}


def test_the_changelog_is_of_the_version_that_is_installed(installed, wheel):
    program = "import farskip_fused; print(farskip_fused.__version__)"
    version = run(sys.executable, "-c", program, cwd=installed, PYTHONPATH=str(installed)).strip()
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert newest.split()[1] == version == wheel.name.split("-")[1]


def test_the_installed_command_starts_in_under_two_seconds(installed):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = run(sys.executable, installed / "bin" / "farskip", "--help", cwd=installed, PYTHONPATH=str(installed))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "doctor" in out
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


def test_the_installed_package_has_its_kernels_and_its_extension(installed):
    program = "import farskip_fused.kernels, farskip_fused._C as c; print(farskip_fused.kernels.__file__, c.has_cuda)"
    out = run(sys.executable, "-c", program, cwd=installed, PYTHONPATH=str(installed))
    assert out.split() == [str(installed / "farskip_fused" / "kernels" / "__init__.py"), "False"]


def test_without_a_compiler_the_package_installs_without_the_extension(checkout, tmp_path):
    wheel = build_wheel(checkout, tmp_path, FARSKIP_BUILD_CUDA="0", CC="false", CXX="false")
    names = zipfile.ZipFile(wheel).namelist()
    assert "farskip_fused/kernels/__init__.py" in names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.parametrize(("wish", "part"), [("1", "there is no nvcc"), ("yes", "use 0 or 1")])
def test_a_wish_for_cuda_that_cannot_be_met_stops_the_build(checkout, tmp_path, wish, part):
    environment = {**os.environ, "PATH": "/nowhere", "CUDA_HOME": str(tmp_path), "FARSKIP_BUILD_CUDA": wish}
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert part in done.stderr


@pytest.mark.parametrize("folder", [ROOT, Path("/")])
def test_the_checkout_offers_its_kernels_under_one_name(folder):
    program = "import farskip_fused.kernels; print(farskip_fused.kernels.__file__)"
    out = run(sys.executable, "-c", program, cwd=folder)
    assert Path(out.strip()).resolve() == ROOT / "kernels" / "__init__.py"


def test_transformers_is_unharmed_in_the_root_of_the_checkout():
    """It looks for a package called kernels, and there is a folder of that name."""
    program = """
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.utils import is_kernels_available
print(is_kernels_available())
"""
    assert run(sys.executable, "-c", program, cwd=ROOT).split()[-1] == str(kernels_package_installed())


def kernels_package_installed():
    from transformers.utils import is_kernels_available

    return is_kernels_available()


def test_the_package_called_kernels_is_itself_in_the_root_of_the_checkout(tmp_path):
    (tmp_path / "kernels" / "layer").mkdir(parents=True)
    (tmp_path / "kernels" / "__init__.py").write_text("from kernels.layer import Mode\n")
    (tmp_path / "kernels" / "layer" / "__init__.py").write_text("class Mode: pass\n")
    program = "import kernels; from kernels.layer import Mode; assert kernels.Mode is Mode; print(kernels.__file__)"
    out = run(sys.executable, "-c", program, cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert Path(out.strip()) == tmp_path / "kernels" / "__init__.py"
