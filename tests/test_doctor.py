"""The doctor's verdict on made-up environments, and a look at the real one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from farskip_fused import cli
from farskip_fused.doctor import Facts, Report, collect, examine, judge
from farskip_fused.doctor.facts import COMPONENTS, Gpu, Unmet, _in_nvshmem
from farskip_fused.doctor.rendering import issue, render, rows

HOPPER = Gpu("H100", "90", 79.6)
VERSIONS = {
    **dict.fromkeys(COMPONENTS),
    "torch": "2.11.0",
    "triton": "3.6.0",
    "numpy": "2.3.5",
    "transformers": "5.17.0",
    "accelerate": "1.15.0",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.2",
    "nvidia-nvshmem-cu13": "3.4.5",
    "nvshmem4py-cu13": "0.3.1",
}
HEALTHY = Facts(
    python="3.12.3",
    platform="Linux x86_64",
    package="0.1.0",
    pip="python -m pip",
    checkout=None,
    versions=VERSIONS,
    torch_cuda="13.0",
    gpus=[HOPPER],
    driver="580.65",
    driver_gpus=["H100"],
    mps="running",
    nvshmem_library="/nvshmem/lib/libnvshmem_host.so.3",
    bitcode=["/nvshmem/lib/libnvshmem_device.bc"],
    extension="cuda",
    compiler="/usr/bin/c++",
    nvcc="/usr/local/cuda/bin/nvcc",
)
WITHOUT_GPU = replace(HEALTHY, torch_cuda=None, gpus=[], driver=None, driver_gpus=[], mps="missing")


def with_versions(facts, **versions):
    return replace(facts, versions={**facts.versions, **{name.replace("_", "-"): v for name, v in versions.items()}})


def test_a_healthy_environment_has_no_problem():
    assert judge(HEALTHY) == []
    assert judge(WITHOUT_GPU) == []


@pytest.mark.parametrize(
    ("facts", "broken", "what", "command"),
    [
        (replace(HEALTHY, package=None), True, "without being installed", "install -e ."),
        (replace(HEALTHY, torch_error="OSError: libcudart"), True, "OSError: libcudart", "--force-reinstall torch=="),
        (
            replace(HEALTHY, unmet=[Unmet("torch", "triton==3.6.0", "3.9.0")]),
            True,
            "torch needs triton==3.6.0 and 3.9.0 is installed",
            "install 'triton==3.6.0'",
        ),
        (
            replace(HEALTHY, unmet=[Unmet("farskip-fused", "torch>=2.9", None)]),
            True,
            "farskip-fused needs torch>=2.9 and it is not installed",
            "install 'torch>=2.9'",
        ),
        (with_versions(HEALTHY, transformers=None), False, "transformers", "farskip-fused[hf]"),
        (with_versions(WITHOUT_GPU, numpy="2.4.0"), True, "interpreter", "install 'numpy<2.4'"),
        (with_versions(WITHOUT_GPU, triton="3.5.1", numpy="2.5.0"), True, "interpreter", "install 'numpy<2.4'"),
        (replace(HEALTHY, torch_cuda=None, gpus=[]), True, "build without CUDA", "uninstall -y torch"),
        (replace(HEALTHY, gpus=[]), True, "cannot use the GPU (H100) with driver 580.65", "nvidia-smi"),
        (replace(HEALTHY, mps="stopped"), False, "MPS", "nvidia-cuda-mps-control -d"),
        (with_versions(HEALTHY, nvshmem4py_cu13=None), False, "nvshmem4py", "[nvshmem-cu13]"),
        (
            with_versions(HEALTHY, nvshmem4py_cu13=None, nvshmem4py_cu12="0.4.1"),
            True,
            "nvshmem4py-cu12 0.4.1 is for CUDA 12",
            "[nvshmem-cu13]",
        ),
        (
            replace(HEALTHY, torch_cuda="12.8"),
            True,
            "nvshmem4py-cu13 0.3.1 is for CUDA 13 and torch is built for CUDA 12.8",
            "uninstall -y nvshmem4py-cu13 nvidia-nvshmem-cu13",
        ),
        (replace(HEALTHY, nvshmem_library=None), True, "host library", "[nvshmem-cu13]"),
        (replace(HEALTHY, bitcode=[]), False, "bitcode", "[nvshmem-cu13]"),
        (
            replace(HEALTHY, bitcode=["/lib/libnvshmem_device_sm_80.bc"]),
            False,
            "for sm_80 and the GPU is sm_90",
            "--upgrade nvidia-nvshmem-cu13",
        ),
        (
            with_versions(HEALTHY, nvidia_nvshmem_cu13="3.8.0"),
            False,
            "Triton 3.6.0 cannot read the bitcode of NVSHMEM 3.8.0",
            "'nvidia-nvshmem-cu13<3.8'",
        ),
        (replace(HEALTHY, extension="missing"), True, "was not built", "install --no-deps --force-reinstall"),
        (replace(HEALTHY, extension="missing", compiler=None), True, "was not built", "apt-get install g++ && "),
        (
            replace(HEALTHY, extension="missing", extension_error="ImportError: undefined symbol"),
            True,
            "undefined symbol",
            "install --no-deps --force-reinstall",
        ),
        (
            replace(HEALTHY, extension="missing", checkout="/my work"),
            True,
            "not built",
            "install --no-deps -e '/my work'",
        ),
        (
            with_versions(replace(HEALTHY, checkout="/src"), transformers=None),
            False,
            "transformers",
            "install -e '/src[hf]'",
        ),
        (replace(HEALTHY, extension="cpu"), False, "CPU part alone", "FARSKIP_BUILD_CUDA=1 "),
    ],
)
def test_a_problem_is_named_with_the_command_that_mends_it(facts, broken, what, command):
    (problem,) = judge(facts)
    assert problem.broken is broken
    assert what in problem.what
    assert command in problem.command


@pytest.mark.parametrize(
    "facts",
    [
        with_versions(HEALTHY, numpy="2.4.0"),  # kernels are compiled: the interpreter does not matter
        with_versions(WITHOUT_GPU, triton="3.7.1", numpy="2.4.6"),
        with_versions(HEALTHY, triton="3.9.0", nvidia_nvshmem_cu13="3.8.0"),
        replace(HEALTHY, bitcode=["/lib/libnvshmem_device_sm_80.bc", "/lib/libnvshmem_device_sm_90.bc"]),
        with_versions(WITHOUT_GPU, nvshmem4py_cu13=None, vllm=None),
        replace(HEALTHY, gpus=[HOPPER, HOPPER], mps="stopped"),
        replace(WITHOUT_GPU, extension="cpu"),
    ],
)
def test_what_does_no_harm_is_not_reported(facts):
    assert judge(facts) == []


def test_what_is_broken_comes_first():
    problems = judge(replace(with_versions(HEALTHY, transformers=None), extension="missing"))
    assert [problem.broken for problem in problems] == [True, False]


def test_this_environment_is_usable():
    report = examine()
    assert report.usable, report.problems
    assert json.loads(json.dumps(report.to_dict()))["facts"]["versions"]["torch"] == report.facts.versions["torch"]


def test_the_report_prints_each_command_on_a_line_of_its_own(capsys):
    report = examine()
    long_command = "python -m pip install " + "x" * 200
    render(replace(report, problems=[replace(judge(replace(HEALTHY, package=None))[0], command=long_command)]))
    out = capsys.readouterr().out
    assert f"  {long_command}\n" in out
    assert "is broken" in out
    assert all(name in out for name, _ in rows(report.facts))


def test_an_issue_is_told_everything_but_the_home_directory(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    facts = replace(
        HEALTHY, checkout="/home/me/farskip", commit="abc1234-dirty", nccl="2.27.7", topology="GPU0 GPU1 NIC0\n",
        nvcc_version="release 13.0", nvshmem_library="/home/me/lib/libnvshmem_host.so.3", gpus=[HOPPER, HOPPER],
        variables={"NVSHMEM_HOME": "/home/me/lib"}, extension="missing",
    )  # fmt: skip
    text = issue(Report(facts, judge(facts)))
    block, problems = text.removeprefix("```text\n").split("\n```\n")
    assert all(name in block for name, _ in rows(facts))
    for told in ("checkout at abc1234-dirty", "2.27.7", "GPU0 GPU1 NIC0", "nvcc (release 13.0)", "NVSHMEM_HOME=~/lib"):
        assert told in block
    assert block.count("sm_90") == 2 and "~/lib/libnvshmem_host.so.3" in block
    assert problems.startswith("- broken: ") and "install --no-deps -e ~/farskip" in problems
    assert "/home/me" not in text


def test_an_issue_is_told_the_variables_that_matter_and_no_others(monkeypatch, capsys):
    monkeypatch.setenv("FARSKIP_TUNED", "/somewhere/tuned.json")
    monkeypatch.setenv("MY_TOKEN", "secret")
    monkeypatch.delenv("NVSHMEM_HOME", raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--issue"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert out.startswith("```text\nfarskip-fused ") and "FARSKIP_TUNED=/somewhere/tuned.json\n" in out
    assert "secret" not in out and "NVSHMEM_HOME" not in out


def test_a_requirement_that_is_not_met_is_found(monkeypatch):
    installed = metadata.version
    older = {"torch": "2.8.0", "transformers": "4.57.0"}
    monkeypatch.setattr(metadata, "version", lambda name: older.get(name) or installed(name))
    unmet = {(one.distribution, one.requirement, one.found) for one in collect().unmet}
    assert ("farskip-fused", "torch>=2.9", "2.8.0") in unmet
    assert ("farskip-fused", "transformers>=5.17", "4.57.0") in unmet


def test_bitcode_is_found_by_glob_in_nvshmem_home(monkeypatch, tmp_path):
    names = ["libnvshmem_device.bc", "libnvshmem_device_sm_90.bc"]
    (tmp_path / "lib").mkdir()
    for name in names:
        (tmp_path / "lib" / name).touch()
    monkeypatch.setenv("NVSHMEM_HOME", str(tmp_path))
    assert [path.rpartition("/")[2] for path in _in_nvshmem("libnvshmem_device*.bc")][:2] == names


def test_it_works_without_torch():
    """In a process where importing torch fails as it does when torch is not installed."""
    program = """
import sys
sys.modules["torch"] = None
from importlib import metadata
original = metadata.version
def version(name):
    if name == "torch":
        raise metadata.PackageNotFoundError(name)
    return original(name)
metadata.version = version
from farskip_fused import cli
cli.main(["doctor"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "farskip-fused needs torch>=2.9 and it is not installed." in done.stdout
    assert "install 'torch>=2.9'" in done.stdout
