"""`make bench` without a GPU: what it would run, what it leaves out, and what it does with results."""

import importlib.util
import json

import pytest

from farskip_fused import cli
from farskip_fused.bench import readme, result_files, suite

EIGHT = suite.parts(8)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout's folder of results, with nothing in it, whose documents are not written."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(suite, "write_documents", lambda: None)
    return tmp_path


def part(program, **changes):
    return suite.Part(**{"name": "some", "gpus": 1, "file": "some", "command": ("-c", program), "minutes": 1} | changes)


WRITES = "import json, os, sys; json.dump(os.environ['CUDA_VISIBLE_DEVICES'], open(sys.argv[-1], 'w'))"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="says what answers where vLLM is missing")
@pytest.mark.parametrize(
    "found", [one for one in EIGHT if one.name != "recovery"], ids=lambda one: f"{one.gpus}-{one.file}"
)
def test_each_part_is_a_command_line_that_lacks_a_gpu_alone(found, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*found.command[2:], "--json", str(tmp_path / "result.json")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "this machine has none" in said or "This needs vLLM" in said


def test_every_table_of_the_readme_has_a_part_that_measures_it(tmp_path, monkeypatch):
    asked = set()

    def find(benchmark, *, several, folder):
        asked.add((benchmark, several))
        return []

    monkeypatch.setattr(readme, "find", find)
    for section in readme.SECTIONS.values():
        section(tmp_path)
    for one in suite.parts(2):
        (tmp_path / f"{result_files.machine('NVIDIA H100', one.gpus)}-{one.file}.json").write_text("{}")
    assert len(asked) == 9
    assert all(result_files.find(name, several=several, folder=tmp_path) for name, several in asked)


def test_no_two_parts_write_the_same_file():
    files = [(one.gpus, one.file) for one in EIGHT]
    assert len(set(files)) == len(files)
    assert {one.gpus for one in suite.parts(4)} == {1, 2, 4}


@pytest.mark.parametrize(("benchmark", "several"), [("layer-.*", True), ("vllm-.*", False), ("vllm-.*", True)])
def test_every_file_that_a_table_of_several_takes_is_one_that_a_part_replaces(benchmark, several):
    written = {(one.gpus, one.file) for one in EIGHT}
    results = result_files.find(benchmark, several=several)
    assert results
    for found in results:
        machine = result_files.machine(found.report["environment"]["gpu"], found.gpus)
        assert (found.gpus, found.path.stem.removeprefix(f"{machine}-")) in written


def test_a_result_replaces_the_machines_file_and_sees_as_many_gpus_as_it_needs(checkout, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    old = checkout / "results" / "two-h200-some.json"
    old.write_text('"old"')
    one = part(WRITES, gpus=2)
    assert suite.run([one], "NVIDIA H200")[one].startswith("done")
    assert json.loads(old.read_text()) == "3,5"


@pytest.mark.parametrize(
    ("program", "minutes", "why"),
    [
        (WRITES + "; sys.exit(3)", 1, "exit code 3"),
        ("pass", 1, "it left no result"),
        ("import time; time.sleep(60)", 0, "out of time"),
    ],
)
def test_a_part_that_fails_leaves_the_result_that_was_there(checkout, program, minutes, why):
    old = checkout / "results" / "h200-some.json"
    old.write_text('"old"')
    one = part(program, minutes=minutes)
    outcome = suite.run([one], "NVIDIA H200")[one]
    assert outcome.startswith("failed") and why in outcome
    assert json.loads(old.read_text()) == "old"


def test_what_is_not_installed_is_left_out_with_its_command(checkout, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    one = part(WRITES, needs=("vllm",))
    outcome = suite.run([one], "NVIDIA H200")[one]
    assert outcome == "left out: vllm is not installed; pip install 'farskip-fused[vllm]'"
    assert not list((checkout / "results").iterdir())


@pytest.mark.parametrize(
    ("arguments", "why"),
    [(["exprets"], "unknown part 'exprets'"), (["--gpus", "4"], "torch sees 2 here"), ([], "torch sees none")],
)
def test_what_cannot_run_is_refused(arguments, why, capsys, monkeypatch):
    monkeypatch.setattr(suite, "gpus_here", lambda: ["NVIDIA H200"] * 2 if arguments else [])
    with pytest.raises(SystemExit) as stopped:
        suite.main(arguments)
    assert stopped.value.code == 2
    assert why in capsys.readouterr().err
