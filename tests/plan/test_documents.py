"""The figures in docs/ are those that the commands print today, and the commands run."""

import re
from pathlib import Path
from statistics import median

import pytest
from typer.testing import CliRunner

from farskip_fused.bench import open_questions, plan_accuracy
from farskip_fused.bench.result_files import find
from farskip_fused.cli import app

DOCS = Path(__file__).parents[2] / "docs"


def between(document, name):
    return (DOCS / document).read_text().split(f"<!-- {name} -->\n")[1].split(f"\n<!-- end of {name} -->")[0]


def test_the_first_command_of_the_guide_and_its_script_run():
    guide = (DOCS / "planning.md").read_text()
    command = re.search(r"^farskip (plan .*?)\s*#", guide, re.MULTILINE)[1]
    assert CliRunner().invoke(app, command.split()).exit_code == 0
    found = {}
    exec(re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1], found)
    assert found["prediction"].speedup > 1


def test_the_accuracy_table_is_what_the_command_prints():
    assert between("plan-accuracy.md", "accuracy") == plan_accuracy.table()


def test_the_table_of_layers_is_what_the_command_prints():
    assert between("plan-accuracy.md", "layers") == plan_accuracy.layer_table()


def test_two_models_in_one_file_are_predicted_as_in_files_of_their_own(monkeypatch):
    results = [found for found in find("layer-.*", several=True) if found.gpus == 4]
    for found in results:
        found.report["rows"] = [
            row for row in found.report["rows"] if (row["link"], row["direction"]) == ("50", "forward")
        ]
    rows = [row for found in results for row in found.report["rows"]]
    assert len({row["shape"] for row in rows}) == 2
    together = results[0]._replace(report=results[0].report | {"rows": rows})
    monkeypatch.setattr(plan_accuracy, "find", lambda *_, **__: results)
    apart = list(plan_accuracy.layers())
    monkeypatch.setattr(plan_accuracy, "find", lambda *_, **__: [together])
    assert list(plan_accuracy.layers()) == apart


def test_half_of_the_measured_layers_are_predicted_within_a_tenth():
    times = [one for _, ways in plan_accuracy.layers() for way, one in ways.items() if way != plan_accuracy.GIVEN]
    assert median(abs(predicted / measured - 1) for measured, predicted in times) < 0.1


@pytest.mark.parametrize("question", ["depth", "window", "trillion"])  # sweeps of 1024 GPUs take longer
def test_the_answers_are_what_the_command_prints(question, tmp_path):
    assert between("open-questions.md", question) == open_questions.QUESTIONS[question](tmp_path)
    drawn = {file.name for file in tmp_path.iterdir()}
    assert drawn == {f"open-questions-{question}.png"} and (DOCS / drawn.pop()).stat().st_size < 200_000


def test_training_figures_of_the_paper_are_predicted_within_a_tenth():
    training = [row for row in plan_accuracy.ROWS if row.job.phase == "training"]
    assert len(training) == 5
    for row in training:
        assert plan_accuracy.predict(row.job).speedup == pytest.approx(row.speedup[0], rel=0.1)
