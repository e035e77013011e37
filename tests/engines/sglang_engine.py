"""SGLang's engine for CPUs in a process of its own, which it takes down with it when it fails.

``python -m tests.engines.sglang_engine CHECKPOINT OUTPUT OPTIONS`` writes its answers to ``prompts`` as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.engines.sglang_stand_ins import run_scheduler  # isort: skip
from tests.engines.served import NEW_TOKENS, Answer, prompts

SERVED = ("deepseek_v2", "qwen3_moe")


def other_families() -> list[str]:
    """SGLang's modules with models that are not served here, and take long to import."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations is not None
    models = pkgutil.iter_modules([f"{spec.submodule_search_locations[0]}/srt/models"])
    return [model.name for model in models if not model.ispkg and model.name not in SERVED]


os.environ.update(SGLANG_USE_CPU_ENGINE="1", SGLANG_DISABLED_MODEL_ARCHS=",".join(other_families()))


def serve(checkpoint: Path, output: Path, ranks: int = 1) -> list[Answer]:
    """SGLang's answers to ``prompts``, in float32; output: a file for them."""
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    command = [sys.executable, "-m", "tests.engines.sglang_engine", checkpoint, output, json.dumps({"tp_size": ranks})]
    subprocess.run(command, check=True, env=os.environ | {"SGLANG_CPU_OMP_THREADS_BIND": binding})
    return [
        Answer(answer["output_ids"], [{token: value for value, token, _ in step} for step in answer["top_logprobs"]])
        for answer in json.loads(output.read_text())
    ]


def main(checkpoint: str, output: str, options: dict[str, Any]) -> None:
    from sglang.srt.entrypoints.engine import Engine

    class CpuEngine(Engine):
        run_scheduler_process_func = staticmethod(run_scheduler)

    engine = CpuEngine(
        model_path=checkpoint,
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        skip_tokenizer_init=True,
        context_length=128,
        chunked_prefill_size=32,
        max_total_tokens=2048,
        max_running_requests=4,
        **options,
    )
    how = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    answers = engine.generate(input_ids=prompts(), sampling_params=how, return_logprob=True, top_logprobs_num=4)
    found = [
        {"output_ids": answer["output_ids"], "top_logprobs": answer["meta_info"]["output_top_logprobs"]}
        for answer in answers
    ]
    Path(output).write_text(json.dumps(found))
    engine.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
