"""README's tables: what the command writes from bench/results/ today, and what it makes of other files there."""

import json
import shutil
from pathlib import Path

import pytest

from farskip_fused.bench import readme, result_files
from farskip_fused.errors import UsageError

README = Path(__file__).parents[1] / "README.md"
V2_LITE = "two-h200-layer-v2-lite.json"


@pytest.fixture
def folder(tmp_path):
    """One file of layers, without ways over NCCL, to which a test adds others."""
    shutil.copy(result_files.FOLDER / V2_LITE, tmp_path)
    add(tmp_path, V2_LITE, without_nccl)
    return tmp_path


def without_nccl(report):
    report["rows"] = [{key: row[key] for key in row if not key.startswith("nccl")} for row in report["rows"]]


def add(folder, name, change):
    report = json.loads((folder / V2_LITE).read_text())
    change(report)
    (folder / name).write_text(json.dumps(report))


def rows_of(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_the_readme_is_what_the_command_writes():
    text = README.read_text()
    assert readme.written(text) == text


def test_layers_of_other_numbers_of_gpus_are_a_table_of_their_own(folder):
    def on_four(report):
        report["environment"]["date"] = "2027-01-31"
        others = {"nccl_blocking_ms": 3.0, "nccl_blocking_spread_ms": 0.1}
        report["rows"] = [row | {"ranks": 4, "fused_ms": 0.125, "link": "ib400"} | others for row in report["rows"][2:]]

    add(folder, "four-h200-layer-v2-lite.json", on_four)
    two, four = readme.layers(folder).split("\n\nFour H200")
    assert two.startswith("Two H200 (") and "--ranks 2 --link none --link 50" in " ".join(two.split())
    assert "2027-01-31" in four and "--ranks 4 --link ib400" in " ".join(four.split())
    assert [row[6] for row in rows_of(four)[2:]] == ["**0.125**", "**0.125**"]
    assert rows_of(four)[0][7] == "NCCL, blocking" and rows_of(four)[2][7] == "3.000"
    assert "NCCL" not in " ".join(rows_of(two)[0])
    assert rows_of(four)[2][:3] == ["DeepSeek-V2-Lite", "50 GB/s, by puts", "forward"]


def test_files_of_one_machine_share_a_table_that_names_all_their_dates(folder):
    def another_model(report):
        report["environment"]["date"] = "2027-01-31"
        report["rows"] = [row | {"shape": "qwen3-30b-a3b"} for row in report["rows"]]

    before = len(rows_of(readme.layers(folder)))
    add(folder, "two-h200-layer-qwen3.json", another_model)
    table = readme.layers(folder)
    assert len(rows_of(table)) == 2 * before - 2
    assert "2026-11-26 and 2027-01-31" in " ".join(table.split())


def test_two_files_that_hold_the_same_row_are_refused(folder):
    add(folder, "two-h200-layer-again.json", lambda report: None)
    with pytest.raises(UsageError, match=r"v2-lite\.json and two-h200-layer-again\.json both hold"):
        readme.layers(folder)


def test_a_table_without_results_or_marks_is_refused(folder):
    with pytest.raises(UsageError, match="no results for the table 'recovery'"):
        readme.written(README.read_text(), folder)
    with pytest.raises(UsageError, match="no <!-- experts -->"):
        readme.written(README.read_text().replace("<!-- experts -->", ""))


@pytest.mark.parametrize(
    ("times", "bold"),
    [
        ({"ours": (1.0, 0.1), "other": (1.3, 0.1)}, "ours"),
        ({"ours": (1.0, 0.1), "other": (1.15, 0.1)}, None),
        ({"ours": (1.0, 0.1)}, None),
    ],
)
def test_what_is_fastest_by_more_than_both_spreads_is_bold(times, bold):
    cells = {name: {"ms": ms, "spread_ms": spread} for name, (ms, spread) in times.items()}
    assert readme._fastest(cells) == bold


@pytest.mark.parametrize(
    ("gpu", "gpus", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 1, "h100"),
        ("NVIDIA A100-SXM4-80GB", 4, "four-a100"),
        ("NVIDIA GeForce RTX 4090", 2, "two-4090"),
    ],
)
def test_a_file_is_found_by_the_name_that_its_machine_gives_it(gpu, gpus, name, tmp_path):
    assert result_files.machine(gpu, gpus) == name
    (tmp_path / f"{name}-comm.json").write_text("{}")
    (tmp_path / f"{name}-comm-4-ranks.json").write_text("{}")
    (found,) = result_files.find("comm", several=gpus > 1, folder=tmp_path)
    assert found.gpus == gpus and not result_files.find("comm", several=gpus == 1, folder=tmp_path)
