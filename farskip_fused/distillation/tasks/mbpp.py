"""MBPP and MBPP+ from a local JSONL file: Google's, the sanitized one, or EvalPlus' MbppPlus.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from farskip_fused.distillation.records import read_records
from farskip_fused.distillation.tasks.task import Task
from farskip_fused.errors import UsageError

STOPS = ('\n"""', "\nassert ", "\nprint", "\nif __name__", "\n#", "\n```")

# Compares with the canonical solution, numbers within the file's tolerance.
PLUS = """\
def _same(found, expected, tolerance):
    if isinstance(expected, float) or tolerance:
        if isinstance(expected, (int, float)) and isinstance(found, (int, float)):
            return abs(found - expected) <= (tolerance or 1e-6) + 1e-7 * abs(expected) or found == expected
        if isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)):
            return len(found) == len(expected) and all(_same(f, e, tolerance) for f, e in zip(found, expected))
    return found == expected
import copy as _copy, json as _json
_scope = {{}}
exec({solution!r}, _scope)
for _inputs in _json.loads({inputs!r}):
    _expected = _scope[{name!r}](*_copy.deepcopy(_inputs))
    assert _same({name}(*_inputs), _expected, {tolerance!r})
"""


def mbpp_tasks(file: Path) -> list[Task]:
    """The tasks of a JSONL file. Raises UsageError for a file that is missing or of another kind."""
    if not file.is_file():
        raise UsageError(f"{file} is not there; give MbppPlus.jsonl or mbpp.jsonl.")
    tasks = [_task(where, record) for where, record in read_records(file)]
    if not tasks:
        raise UsageError(f"{file} holds no tasks; give MbppPlus.jsonl or mbpp.jsonl.")
    return tasks


def _task(where: str, record: dict[str, Any]) -> Task:
    name = str(record.get("task_id"))
    if {"prompt", "entry_point", "canonical_solution", "base_input", "plus_input"} <= record.keys():
        inputs = json.dumps([*record["base_input"], *record["plus_input"]])
        check = PLUS.format(
            solution=record["canonical_solution"],
            inputs=inputs,
            name=record["entry_point"],
            tolerance=record.get("atol") or 0,
        )
        return Task(name, record["prompt"].rstrip() + "\n", check, STOPS, kept=False)
    if {"test_list"} <= record.keys() and ("text" in record or "prompt" in record):
        text, tests = record.get("text") or record["prompt"], record["test_list"]
        set_up = [record.get("test_setup_code") or "", *record.get("test_imports", [])]
        return Task(name, f'"""\n{text}\n{tests[0]}\n"""\n', "\n".join([*set_up, *tests]), STOPS, kept=False)
    raise UsageError(f"{where} is no task of MBPP or MBPP+.")
