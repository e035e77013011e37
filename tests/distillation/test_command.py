"""``farskip distill`` and ``farskip eval`` on a tiny checkpoint with a tokenizer."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import farskip_fused as ff
from farskip_fused import cli
from farskip_fused.conversion import connectivity_of
from farskip_fused.distillation import evaluate, read_documents, train_tokenizer
from farskip_fused.distillation.data import as_blocks

SMALL = ("--block-length", "16", "--batch-tokens", "64", "--learning-rate", "5e-3")


def run(capsys, *arguments):
    """Exit code, stdout and stderr of the command."""
    capsys.readouterr()  # what transformers has printed so far
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    for index in range(8):
        (tmp_path / "text" / f"{index}.py").write_text(f"def square_{index}(x):\n    return x * x + {index}\n" * 4)
    return tmp_path / "text"


@pytest.fixture
def checkpoints(tmp_path, text, build):
    """Directories of a stock checkpoint and of the same model converted, both with a tokenizer."""
    tokenizer = train_tokenizer(read_documents(text), 300)
    model = build(vocab_size=300)
    for name in ("stock", "converted"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        ff.convert(model)
    return tmp_path / "stock", tmp_path / "converted"


def test_eval_gives_what_the_library_gives(capsys, tmp_path, text, checkpoints):
    stock, converted = checkpoints
    file = tmp_path / "report.json"
    code, out, _ = run(
        capsys, "eval", converted, "--data", text, "--teacher", stock, "--block-length", 16, "--json", file
    )
    assert code == 0
    assert "KL to teacher" in out
    model = ff.load(converted)
    tokenizer = train_tokenizer(read_documents(text), 300)
    blocks = as_blocks(text, 16, tokenizer)
    report = json.loads(file.read_text())
    assert report["val_ce"] == pytest.approx(evaluate(model, blocks).val_ce, rel=1e-6)
    assert report["kl"] == pytest.approx(evaluate(model, blocks, ff.revert(ff.load(converted))).kl, rel=1e-5)
    assert report["tokens"] == blocks.numel()


def test_eval_of_a_stock_checkpoint_without_a_teacher(capsys, text, checkpoints):
    code, out, _ = run(capsys, "eval", checkpoints[0], "--data", text, "--block-length", 16)
    assert code == 0
    assert "KL" not in out


def test_distill_saves_a_checkpoint_nearer_to_its_teacher(capsys, tmp_path, text, checkpoints):
    stock, converted = checkpoints
    output, file = tmp_path / "output", tmp_path / "report.json"
    code, _, _ = run(
        capsys,
        "distill",
        converted,
        output,
        "--data",
        text,
        "--validation",
        text,
        "--steps",
        20,
        *SMALL,
        "--json",
        file,
    )
    assert code == 0
    report = json.loads(file.read_text())
    assert (report["steps"], report["tokens"]) == (20, 20 * 64)
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    for checkpoint, result in ((converted, before), (output, after)):
        run(capsys, "eval", checkpoint, "--data", text, "--teacher", stock, "--block-length", 16, "--json", result)
    kl = [json.loads(result.read_text())["kl"] for result in (before, after)]
    assert kl[1] < 0.7 * kl[0]
    assert report["evaluations"][-1][1]["kl"] == pytest.approx(kl[1], rel=1e-5)


def test_an_existing_output_is_kept_unless_told(capsys, tmp_path, text, checkpoints):
    _, converted = checkpoints
    output = tmp_path / "output"
    output.mkdir()
    arguments = ("distill", converted, output, "--data", text, "--steps", 1, *SMALL)
    code, _, err = run(capsys, *arguments)
    assert (code, err) == (2, f"farskip: OUTPUT {output} exists; name another or pass --overwrite.\n")
    assert list(output.iterdir()) == []
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert (output / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("distill", "converted", "converted", "--data", "text", "--overwrite"), "is MODEL_DIR itself"),
        (("distill", "stock", "out", "--data", "text", *SMALL), "standard connectivity"),
        (("distill", "converted", "out", "--data", "text", "--objective", "dpo"), "Unknown objective 'dpo'"),
        (("distill", "converted", "out", "--data", "nowhere", *SMALL), "does not exist"),
        (("distill", "text", "out", "--data", "text", *SMALL), "config.json is missing"),
        (
            ("distill", "converted", "out", "--data", "text", "--block-length", "65", "--batch-tokens", "65"),
            "longer than",
        ),
        (("eval", "bare", "--data", "text"), "holds no tokenizer"),
        (("eval", "converted", "--data", "text", "--device", "abacus"), "Device 'abacus' is not there"),
        (("eval", "converted"), "Nothing to evaluate"),
        (("eval", "converted", "--functions", "4", "--teacher", "stock"), "give --data"),
        (("eval", "converted", "--mbpp", "nowhere.jsonl"), "nowhere.jsonl is not there"),
        (("distill", "converted", "out", "--data", "text", "--preset", "large"), "Unknown preset 'large'"),
        (("distill", "converted", "out", "--data", "text", "--parallel", "fsdp"), "start with: torchrun"),
        (("distill", "converted", "out", "--data", "text", "--resume", *SMALL), "give the folder"),
        (("distill", "stock", "out", "--data", "text", "--layers", "last:200%", *SMALL), "'last:200%'"),
        (("distill", "converted", "out", "--data", "text", "--tensorboard"), "name one with --work"),
        (("distill", "converted", "out", "--data", "text", "--parallel", "ep", "--device", "cpu"), "--device out"),
        (
            ("distill", "converted", "out", "--data", "text", "--work", "work", "--resume", "--sweep", "lr"),
            "leave --sweep out",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, tmp_path, monkeypatch, checkpoints, arguments, part):
    monkeypatch.chdir(tmp_path)
    ff.load(checkpoints[1]).save_pretrained(tmp_path / "bare")
    code, _, err = run(capsys, *arguments)
    assert code == 2
    # transformers draws a bar while it loads.
    *_, sentence = err.splitlines()
    assert sentence.startswith("farskip: ")
    assert part in sentence
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_diverged_training_is_one_sentence_and_its_weights_are_saved_as_they_were(
    capsys, tmp_path, text, checkpoints
):
    """A model in bfloat16 with routers' biases in float32, of which no step is finite."""
    _, converted = checkpoints
    model = ff.load(converted)
    model.bfloat16()
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias = torch.full((4,), 1.001)
    model.lm_head.weight.data.fill_(torch.nan)
    model.save_pretrained(converted)
    code, _, err = run(capsys, "distill", converted, tmp_path / "out", "--data", text, "--steps", 2, *SMALL)
    sentence = err.splitlines()[-1]
    assert code == 1
    assert sentence.startswith("farskip: Training diverged: 2 steps in a row up to 2 of 2 were skipped")
    assert sentence.endswith(f"They are saved to {tmp_path / 'out'}.")
    before, after = (load_file(path / "model.safetensors") for path in (converted, tmp_path / "out"))
    assert {each.dtype for each in after.values()} == {torch.bfloat16, torch.float32}
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_distilled_weights_differ_from_the_source_and_leave_it(capsys, tmp_path, text, checkpoints):
    _, converted = checkpoints
    before = ff.load(converted).state_dict()
    run(capsys, "distill", converted, tmp_path / "output", "--data", text, "--steps", 1, *SMALL)
    after = ff.load(tmp_path / "output").state_dict()
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in ff.load(converted).state_dict().items())


def test_a_stock_checkpoint_is_converted_swept_stopped_and_logged(capsys, tmp_path, text, checkpoints):
    """Everything at once: the last layers converted and trained, a sweep before, early stopping, a log."""
    stock, _ = checkpoints
    output, work, file = tmp_path / "output", tmp_path / "work", tmp_path / "report.json"
    tasks = tmp_path / "mbpp.jsonl"
    tasks.write_text(json.dumps({"task_id": 1, "text": "One.", "test_list": ["assert one() == 1"]}) + "\n")
    code, out, _ = run(
        capsys, "distill", stock, output, "--data", text, "--preset", "demo", "--layers", "last:50%",
        "--train-layers", "last:50%", "--objective", "kl+l2", "--sweep", "lr", "--sweep-steps", 1, "--steps", 4,
        "--block-length", 16, "--batch-tokens", 64, "--stop-on", tasks, "--metric-every", 1, "--patience", 1,
        "--work", work, "--checkpoint-every", 1, "--teacher-form", "int8", "--json", file,
    )  # fmt: skip
    assert code == 0
    assert "Sweep of learning rate" in out
    assert "with whole logits it would take" in " ".join(out.split())
    report = json.loads(file.read_text())
    assert [trial["value"] for trial in report["sweeps"][0]["trials"]] == [2e-5, 4e-5, 8e-5]
    assert report["config"]["learning_rate"] == report["sweeps"][0]["winner"]
    assert report["config"]["patience"] == 1
    assert [value for _, value in report["metrics"]] == [0.0] * 4
    assert (report["best_tokens"], report["stopped_early"]) == (64, False)
    assert len((work / "log.jsonl").read_text().splitlines()) == 8
    model = ff.load(output)
    names = [connectivity.name for connectivity in connectivity_of(model)]
    assert names == ["standard", "standard", "farskip", "farskip"]


def test_eval_solves_small_functions(capsys, tmp_path, text, build):
    ff.convert(build(vocab_size=300, max_position_embeddings=256)).save_pretrained(tmp_path / "model")
    train_tokenizer(read_documents(text), 300).save_pretrained(tmp_path / "model")
    file = tmp_path / "report.json"
    code, out, _ = run(capsys, "eval", tmp_path / "model", "--functions", 3, "--max-new-tokens", 2, "--json", file)
    assert code == 0
    assert "small functions, pass@1 of 3" in out
    assert json.loads(file.read_text())["functions"] == {"pass_at_1": 0.0, "tasks": 3, "solved": [False] * 3}
