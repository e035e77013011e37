"""Every expert kernel compiles for sm_90 on a machine without a GPU, with the oldest and the newest Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compile_offline import SHARED_MEMORY_LIMIT

ROOT = Path(__file__).resolve().parents[2]
# Where `make setup` puts the oldest Triton that the package supports, and the oldest with Gluon as the kernels use it.
OLDER = {name: ROOT / ".venv" / f"triton-{name}" for name in ("3.5", "3.6")}


@pytest.mark.parametrize("version", ["installed", *OLDER])
def test_kernels_use_tensor_cores_and_fit_without_spills(version, tmp_path):
    path = [str(ROOT)]
    if version != "installed":
        if not (OLDER[version] / "triton").is_dir():
            pytest.skip(f"needs Triton {version} in {OLDER[version].relative_to(ROOT)}: make setup")
        path.insert(0, str(OLDER[version]))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("compile_offline.py"))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout.splitlines()[-1])
    if version != "installed":
        assert report["triton"].startswith(version)
    assert report["gluon"] == (version != "3.5")
    assert len(report["variants"]) == (52 if report["gluon"] else 24)
    for name, facts in report["variants"].items():
        rows = name.rpartition("rows=")[2]
        small = rows in ("16", "32")  # a warpgroup's product has at least 64 rows
        assert facts["HMMA" if small else "HGMMA"] > 0, name
        assert facts["STL"] == facts["LDL"] == 0, f"{name} spills: {facts}"
        assert facts["shared"] <= SHARED_MEMORY_LIMIT, name
        assert ("hopper" in name) == (facts["UTMALDG"] > 0), name
