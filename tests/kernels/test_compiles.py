"""Every kernel compiles for sm_90 on a machine without a GPU, by the oldest and newest Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compile_offline import SHARED_MEMORY_LIMIT

ROOT = Path(__file__).resolve().parents[2]
# Where `make test-full` puts the oldest Triton of all and the oldest with Gluon as the kernels use it.
OLDER = {name: ROOT / ".venv" / f"triton-{name}" for name in ("3.5", "3.6")}
PLAIN_GEMMS = {"_up_swiglu", "_project", "_down_gradient_swiglu", "_weight_gradient", "_project_to_owner"}
HOPPER_GEMMS = {"up_swiglu_kernel", "project_kernel", "down_gradient_kernel", "weight_gradient_kernel"}
HOPPER_GEMMS |= {"project_to_owner_kernel"}
OTHERS = {
    "_gate", "_route", "_route_backward", "_count", "_sort", "_sum_entries", "_sum_parts", "_gather_rows",
    "_gather_weighted_rows", "_push_routing", "_push_rows", "_take_routing", "_keep_rows", "_poison", "_find_turns",
    "_push_sums", "_push_scalars", "_take_scalars", "_sum", "_wait", "_announce", "_release_arrived", "_start_reduce",
    "_finish_reduce",
}  # fmt: skip
PUTS = {"_put_routing", "_put_scalars", "_signal"}
# Over peers that are reached by puts. Each warp or thread puts for itself only where blocks have a value a thread.
CALL_ON_BLOCKS = {"_push_rows", "_push_sums", "_put_routing", "_put_scalars"}
# With bfloat16 alone: what runs between ranks, as float16 takes the same room, and what knows neither.
WITH_BFLOAT16 = {
    "_count", "_sort", "_route_backward",
    "_push_routing", "_push_rows", "_take_routing", "_keep_rows", "_poison", "_find_turns", "_push_sums",
    "_push_scalars", "_take_scalars", "_sum", "_wait", "_announce", "_release_arrived", "_start_reduce",
    "_finish_reduce",
    "_gather_weighted_rows", "_project_to_owner", "project_to_owner_kernel", *PUTS,
}  # fmt: skip


@pytest.mark.timeout(900)  # two processes compile: on a busy machine they take several times as long
@pytest.mark.parametrize(
    ("version", "dtypes"),
    [
        pytest.param("installed", ("bfloat16",), id="installed"),
        pytest.param("installed", ("float16",), id="installed, float16", marks=pytest.mark.full),
        pytest.param("3.5", ("bfloat16",), id="3.5"),
        pytest.param("3.5", ("float16",), id="3.5, float16", marks=pytest.mark.full),
        pytest.param("3.6", ("bfloat16", "float16"), id="3.6", marks=pytest.mark.full),
    ],
)
def test_kernels_use_tensor_cores_and_fit_without_spills(version, dtypes, tmp_path):
    path = [str(ROOT)]
    if version != "installed":
        if not (OLDER[version] / "triton").is_dir():
            pytest.skip(f"needs Triton {version} in {OLDER[version].relative_to(ROOT)}: make test-full")
        path.insert(0, str(OLDER[version]))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("compile_offline.py")), *dtypes]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout.splitlines()[-1])
    if version != "installed":
        assert report["triton"].startswith(version)
    assert report["gluon"] == (version != "3.5")
    expected = PLAIN_GEMMS | OTHERS | PUTS | (HOPPER_GEMMS if report["gluon"] else set())
    if "bfloat16" not in dtypes:
        expected -= WITH_BFLOAT16
    assert {row["kernel"] for row in report["variants"]} == expected
    if "bfloat16" in dtypes:
        assert {row["kernel"] for row in report["variants"] if row["library_calls"]} == CALL_ON_BLOCKS
    for row in report["variants"]:
        name, kernel = row["name"], row["kernel"]
        assert row["spilled"] == 0, f"{name} spills: {row}"
        assert row["shared"] <= SHARED_MEMORY_LIMIT, name
        assert (kernel in HOPPER_GEMMS) == (row["descriptor"] > 0), name
        assert row["value_a_thread"], name
        if kernel in PLAIN_GEMMS | HOPPER_GEMMS:
            # A warpgroup's product has at least 64 rows; those of a weight's gradient are its own.
            small = kernel != "_weight_gradient" and any(f"rows={rows} " in name for rows in (1, 16, 32))
            assert row["warp" if small else "warpgroup"] > 0, name
        elif kernel == "_gate" or (kernel == "_route" and "T=1024" in name):
            assert row["warp"] > 0, name
        elif kernel == "_route" and not any(f"T={tokens}:" in name for tokens in (1, 64)):
            assert row["warpgroup"] > 0, name
