"""The two operators between which a sum over ranks is under way, the asynchronous all-reduce inside, compiled.

Without vLLM's engine: that wants a GPU for each rank.
"""

from __future__ import annotations

import re
import time

import pytest
import torch
import triton
import triton.language as tl
from torch._inductor.utils import run_and_get_code

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import farskip_fused as ff
from farskip_fused.kernels.machine import nanoseconds
from farskip_fused.launch import run_ranks
from tests.rungs import GPU_RUNGS, RUNGS

TOKENS, HIDDEN = 64, 128
LATE_SECONDS = 2.0


@triton.jit
def stamp_kernel(stamps, index):
    tl.store(stamps + index, nanoseconds())


@torch.library.custom_op("farskip_tests::attend", mutates_args={"stamps"})
def attend(hidden_states: torch.Tensor, weight: torch.Tensor, stamps: torch.Tensor) -> torch.Tensor:
    """In the place of attention, which no compiler looks into either; writes down when it began and ended."""
    stamp_kernel[(1,)](stamps, 0)
    attended = hidden_states @ weight
    stamp_kernel[(1,)](stamps, 1)
    return attended


@attend.register_fake
def _(hidden_states: torch.Tensor, weight: torch.Tensor, stamps: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(hidden_states)


@torch.library.custom_op("farskip_tests::stamp", mutates_args={"total", "stamps"})
def stamp(total: torch.Tensor, stamps: torch.Tensor) -> None:
    """Writes down when the sum was there."""
    stamp_kernel[(1,)](stamps, 2)


def layer(routed: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, stamps: torch.Tensor) -> torch.Tensor:
    from farskip_fused.engines.vllm import all_reduce

    routed, residual = 2 * routed, residual + 1  # what a compiler has to place in memory
    all_reduce.start(routed, residual, all_reduce.ROUTED)
    attended = attend(residual, weight, stamps)
    all_reduce.finish(routed, attended, all_reduce.ROUTED)
    stamp(routed, stamps)
    return routed + attended


def run_late(memory: ff.SymmetricMemory, form: str) -> list[float]:
    """When rank 0's attention ended and its sum was there, seconds after its attention began; rank 1 comes late.

    form: compiled, captured (compiled, in a CUDA graph), or pieces (in two graphs, attention between them).
    """
    from vllm.config import CUDAGraphMode, VllmConfig
    from vllm.forward_context import create_forward_context, override_forward_context

    from farskip_fused.engines.vllm import all_reduce

    device = memory.device
    all_reduce._own = ff.AllReduce(memory, max_tokens=TOKENS, hidden_size=HIDDEN, dtype=torch.float32)
    all_reduce._own.setup()
    weight = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)).to(device)
    routed, residual = torch.zeros(2, TOKENS, HIDDEN, device=device)
    stamps = torch.zeros(3, dtype=torch.int64, device=device)
    run = torch.compile(layer, fullgraph=True)

    def call() -> torch.Tensor:
        return run(routed, residual, weight, stamps)

    found, codes = run_and_get_code(call)
    # Read too, for what a compiler moves need not show in time.
    order = re.findall(r"torch\.ops\.farskip_\w+\.(\w+)\.default\(", "".join(codes))
    assert order == ["all_reduce_start", "attend", "all_reduce_finish", "stamp"]
    memory.synchronize()
    if form == "captured":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
    if form == "pieces":
        before, after, total = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), torch.empty_like(routed)
        piecewise = create_forward_context(None, VllmConfig(), cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE)
        with override_forward_context(piecewise):
            with torch.cuda.graph(before):
                total.copy_(2 * routed)
                all_reduce.start(total, residual, all_reduce.ROUTED)
            attended = attend(residual + 1, weight, stamps)
            with torch.cuda.graph(after, pool=before.pool()):
                all_reduce.finish(total, attended, all_reduce.ROUTED)
                stamp(total, stamps)
    times = []
    for seed in range(3):
        drawn = torch.randn(memory.world + 1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(device)
        routed.copy_(drawn[memory.rank]), residual.copy_(drawn[-1])
        memory.synchronize()
        memory.barrier()
        if memory.rank == 1:
            time.sleep(LATE_SECONDS)
        if form == "compiled":
            found = call()
        elif form == "captured":
            graph.replay()
        else:
            before.replay()
            attended = attend(residual + 1, weight, stamps)
            after.replay()
            found = total + attended
        memory.synchronize()
        expected = (2 * drawn[:-1]).sum(0) + (drawn[-1] + 1) @ weight
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        began, attended_at, summed_at = (stamps.double() * 1e-9).tolist()
        times += [attended_at - began, summed_at - began]
    return times


FORMS = [("compiled", rung) for rung in RUNGS] + [(form, rung) for form in ("captured", "pieces") for rung in GPU_RUNGS]


@pytest.mark.parametrize(
    ("form", "device"), [pytest.param(form, *rung.values, marks=rung.marks) for form, rung in FORMS]
)
def test_attention_ends_before_a_late_rank_gives_its_part_of_the_sum(form: str, device: str) -> None:
    times, _ = run_ranks(run_late, 2, form, device=device)
    assert max(times[::2]) < LATE_SECONDS / 2 < min(times[1::2]), times
