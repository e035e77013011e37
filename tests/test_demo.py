"""A miniature of the demo, end to end: the files, the keys and the story that they tell."""

from __future__ import annotations

import json

import pytest
import torch

from farskip_fused import cli, demo
from farskip_fused.errors import UsageError

TINY = demo.DemoSettings(
    vocab_size=320,
    hidden_size=64,
    num_layers=3,
    num_experts=4,
    moe_intermediate_size=32,
    block_length=32,
    batch_tokens=512,
    teacher_steps=60,
    recovery_steps=20,
    validation_blocks=64,
    evaluations=2,
    new_tokens=8,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Output directory and report of a miniature run."""
    output = tmp_path_factory.mktemp("demo") / "output"
    return output, demo.run(output, settings=TINY)


def test_the_report_is_what_was_returned_with_all_keys(finished):
    output, report = finished
    assert json.loads((output / "report.json").read_text()) == report
    distances = {"val_ce", "kl", "agreement"}
    assert report["converted"].keys() == {"all", "last_half", "attention_only", "moe_only"}
    for values in (*report["converted"].values(), report["fcsd"], report["sft"]):
        assert values.keys() == distances
    for name in ("unigram", "teacher", "control"):
        assert report[name]["val_ce"] > 0
    assert {"world", "backend", "forward_rel_error", "backward_rel_error"} <= report["ep"].keys()
    assert {"device", "python", "torch", "transformers"} <= report["environment"].keys()
    assert isinstance(report["seconds"], float)


def test_the_teacher_learns_and_fcsd_stays_nearer_to_it_than_sft(finished):
    _, report = finished
    assert report["teacher"]["val_ce"] < report["unigram"]["val_ce"]
    assert report["fcsd"]["kl"] < report["converted"]["all"]["kl"]
    assert report["fcsd"]["kl"] < report["sft"]["kl"]
    left = report["fcsd"]["val_ce"] - report["teacher"]["val_ce"]
    damage = report["converted"]["all"]["val_ce"] - report["teacher"]["val_ce"]
    assert report["damage_left"] == left / damage


def test_a_new_process_computes_the_same_logits_and_continues_the_prompt(finished):
    _, report = finished
    assert report["reload_max_abs_diff"] == 0.0
    assert report["sample"]["text"].startswith(report["sample"]["prompt"])
    assert len(report["sample"]["text"]) > len(report["sample"]["prompt"])


def test_split_experts_agree_with_one_process(finished):
    _, report = finished
    assert report["ep"]["forward_rel_error"] < 1e-5
    assert report["ep"]["backward_rel_error"] < 1e-5


def test_the_figures_are_drawn(finished):
    output, _ = finished
    for name in ("recovery.png", "schedule.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_the_number_of_threads_is_restored(finished):
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    with demo._threads(4):
        assert torch.get_num_threads() == 4
    assert torch.get_num_threads() == 7
    torch.set_num_threads(before)


def test_an_existing_output_is_kept_unless_told(tmp_path, capsys):
    with pytest.raises(UsageError, match="pass --overwrite"):
        demo.run(tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="name another directory"):
        demo.run(file, overwrite=True)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"farskip: The output {tmp_path} exists; name another or pass --overwrite.\n"
