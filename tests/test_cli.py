"""The entry point: one sentence and exit code 2 for bad input, and a quick start."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

from farskip_fused import __version__, cli
from farskip_fused.errors import UsageError


def run(capsys, *arguments):
    """Exit code, stdout and stderr of the command."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


@pytest.fixture
def command(monkeypatch):
    """Adds a command for the length of one test."""
    monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))
    return cli.app.command


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_lists_the_commands(capsys, arguments):
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "doctor" in out


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"farskip-fused {__version__}\n", "")


def test_a_usage_error_is_one_sentence_and_exit_code_2(capsys, command):
    @command()
    def fail() -> None:
        raise UsageError("The hidden size is 7;\n  use 8.")

    assert run(capsys, "fail") == (2, "", "farskip: The hidden size is 7; use 8.\n")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("doctr",), "doctr"),
        (("bench",), "Missing command"),
        (("doctor", "--jsn"), "--jsn"),
        (("doctor", "--json"), "--json"),
        (("doctor", "extra"), "extra"),
        (("doctor", "--json", "/nowhere/report.json"), "/nowhere does not exist"),
        (("doctor", "--json", "/"), "is a directory"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(capsys, arguments, part):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert not out
    assert err.startswith("farskip: ")
    assert err.count("\n") == 1
    assert part in err


def test_the_code_of_a_command_is_the_code_of_the_process(capsys, command):
    @command()
    def broken() -> None:
        raise cli.typer.Exit(1)

    assert run(capsys, "broken")[0] == 1


def test_a_defect_keeps_its_traceback(command):
    @command()
    def defect() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.main(["defect"])


def test_json_is_written_where_it_was_asked_for(capsys, command, tmp_path):
    @command()
    def measure(json_file: cli.JsonFile = None) -> None:
        cli.write_json(json_file, {"seconds": 1.5})

    assert run(capsys, "measure", "--json", str(tmp_path / "report.json"))[0] == 0
    assert json.loads((tmp_path / "report.json").read_text()) == {"seconds": 1.5}
    assert run(capsys, "measure")[0] == 0


def test_help_takes_under_two_seconds_and_imports_no_torch():
    """Processor time, which does not depend on what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "farskip_fused.cli", "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
    heavy = "{'torch', 'transformers', 'triton', 'matplotlib'} & set(sys.modules)"
    program = f"import sys, farskip_fused.cli; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", program], check=True)
