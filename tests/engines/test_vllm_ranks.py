"""Two ranks of tensor parallelism: the same answers, and sums that stay where they were launched and awaited."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from tests.engines.served import assert_same_answers, make, serve

SYMBOLS = {
    "vllm::unified_mla_attention_with_output": "A",
    "farskip_fused::all_reduce_start": "S",
    "farskip_fused::all_reduce_finish": "F",
    "farskip_fused::reference_experts": "E",
    # vLLM's sum; through shared memory where the processor has AVX-512.
    "c10d::allreduce_": "V",
    "_C::shm_allreduce": "V",
}
# Attention's sum is under way while the experts run, theirs while the next layer's attention runs. The last layer's
# experts have no attention after them, so vLLM sums their output as ever; the embeddings and the dense layer's, too.
DENSE, FIRST, INNER, LAST = "VAVV", "ASESF", "AFSESF", "AFSEVF"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("own", [False, True], ids=["vLLM's", "farskip_fused's"])
def test_compiled_sums_over_two_ranks_are_under_way_during_what_they_should_overlap(
    own: bool, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the profiler's trace of the operators that each rank ran, in as many passes as it took."""
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    path = make("deepseek_v3", checkpoints, "farskip")
    answers = serve(
        path,
        eager=False,
        traces=tmp_path,
        tensor_parallel_size=2,
        additional_config={"farskip_experts": True, "farskip_all_reduce": own},
    )
    assert_same_answers(answers, path)
    ran = [symbols(file) for file in tmp_path.glob("*.json") if "rank" in file.name]
    assert len(ran) == 2
    one_pass = DENSE + FIRST + INNER + LAST
    if not own:
        one_pass = one_pass.replace("S", "SV")
    for one in ran:
        assert re.fullmatch(f"({one_pass})+", one), one[:100]


def symbols(trace: Path) -> str:
    """What ran, in order, a letter an operator."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") in SYMBOLS]
    return "".join(SYMBOLS[event["name"]] for event in sorted(events, key=lambda event: event["ts"]))
