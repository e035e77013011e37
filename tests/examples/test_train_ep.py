"""The training script learns, and goes on from its checkpoint on the same and on another expert-parallel size."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from farskip_fused.launch import run_ranks
from tests.rungs import GPU_RUNGS

SCRIPT = Path(__file__).parents[2] / "examples" / "train_ep.py"


def interrupted_and_not(device, folder):
    spec = importlib.util.spec_from_file_location("train_ep", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.LAYERS = 1
    whole = script.train(folder, device.type, ep=2, steps=3, save_every=2)
    dist.barrier()
    return [whole, *(script.train(folder, device.type, ep, steps=3, save_every=2) for ep in (2, 1))]


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.rung2), *GPU_RUNGS])
def test_it_resumes_on_the_same_and_on_another_expert_parallel_size(device, tmp_path):
    for whole, same, other in run_ranks(interrupted_and_not, 2, tmp_path / "run", device=device, symmetric=False):
        assert len(whole) == 3
        assert same == whole[2:]
        assert other == pytest.approx(whole[2:], rel=1e-5)


@pytest.mark.full
@pytest.mark.rung2
def test_torchrun_starts_it_and_it_learns(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    done = subprocess.run([*command, tmp_path / "run"], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.split()]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
