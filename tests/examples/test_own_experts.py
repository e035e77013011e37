"""The script with experts of its own learns the same on one rank and on two."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import farskip_fused as ff
from farskip_fused.launch import run_ranks
from tests.rungs import GPU_RUNGS

SCRIPT = Path(__file__).parents[2] / "examples" / "own_experts.py"


def together_and_alone(memory):
    spec = importlib.util.spec_from_file_location("own_experts", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    together = script.train(memory, 3)
    own, _ = dist.new_subgroups(1)
    return together, script.train(ff.init(own, device=memory.device), 3, own)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.rung2), *GPU_RUNGS])
def test_two_ranks_learn_what_one_does(device):
    for together, alone in run_ranks(together_and_alone, 2, device=device):
        assert together == pytest.approx(alone, rel=1e-4)
        assert together[-1] < 0.8 * together[0]


@pytest.mark.full
@pytest.mark.rung2
def test_the_script_runs():
    done = subprocess.run([sys.executable, SCRIPT, "--steps", "3"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3
