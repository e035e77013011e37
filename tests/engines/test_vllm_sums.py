"""The two operators between which a sum over ranks is under way, the asynchronous all-reduce inside, compiled.

Without vLLM's engine: that wants a GPU for each rank.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

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


def until_attention(routed: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from farskip_fused.engines.vllm import all_reduce

    routed, residual = 2 * routed, residual + 1  # what a compiler has to place in memory
    all_reduce.start(routed, residual, all_reduce.ROUTED)
    return routed, residual


def from_attention(routed: torch.Tensor, attended: torch.Tensor, stamps: torch.Tensor) -> torch.Tensor:
    from farskip_fused.engines.vllm import all_reduce

    all_reduce.finish(routed, attended, all_reduce.ROUTED)
    stamp(routed, stamps)
    return routed + attended


def layer(routed: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, stamps: torch.Tensor) -> torch.Tensor:
    routed, residual = until_attention(routed, residual)
    return from_attention(routed, attend(residual, weight, stamps), stamps)


def compiled(*inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The layer, compiled as one; what may move is read, since it need not show in time."""
    run = torch.compile(layer, fullgraph=True)
    _, codes = run_and_get_code(run, *inputs)
    order = re.findall(r"torch\.ops\.farskip_\w+\.(\w+)\.default\(", "".join(codes))
    assert order == ["all_reduce_start", "attend", "all_reduce_finish", "stamp"]
    return lambda: run(*inputs)


def captured(*inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The compiled layer in a CUDA graph."""
    return in_graph(compiled(*inputs))


def in_pieces(
    routed: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, stamps: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """The layer compiled in two pieces, attention between them; each, on a GPU, a CUDA graph."""
    from vllm.config import CUDAGraphMode, VllmConfig
    from vllm.forward_context import create_forward_context, override_forward_context

    pieces = [torch.compile(piece, fullgraph=True) for piece in (until_attention, from_attention)]

    def run() -> torch.Tensor:
        summed, read = pieces[0](routed, residual)
        return pieces[1](summed, attend(read, weight, stamps), stamps)

    run()
    if routed.device.type == "cpu":
        return run
    torch.cuda.synchronize()
    piecewise = create_forward_context(None, VllmConfig(), cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE)
    with override_forward_context(piecewise):
        first = in_graph(lambda: pieces[0](routed, residual))
        summed, read = first.result
        attended = attend(read, weight, stamps)
        last = in_graph(lambda: pieces[1](summed, attended, stamps), first.graph.pool())

    def replay() -> torch.Tensor:
        first()
        attended.copy_(attend(read, weight, stamps))
        return last()

    return replay


class in_graph:
    """A call that replays what ``function`` launches, and its result."""

    def __init__(self, function: Callable[[], Any], pool: Any = None) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.result = function()

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result


def run_late(memory: ff.SymmetricMemory, form: Callable[..., Callable[[], torch.Tensor]]) -> list[float]:
    """When rank 0's attention ended and its sum was there, seconds after its attention began; rank 1 comes late."""
    from farskip_fused.engines.vllm import all_reduce

    device = memory.device
    all_reduce._own = ff.AllReduce(memory, max_tokens=TOKENS, hidden_size=HIDDEN, dtype=torch.float32)
    all_reduce._own.setup()
    weight = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)).to(device)
    routed, residual = torch.zeros(2, TOKENS, HIDDEN, device=device)
    stamps = torch.zeros(3, dtype=torch.int64, device=device)
    run = form(routed, residual, weight, stamps)
    times = []
    for seed in range(3):
        drawn = torch.randn(memory.world + 1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(device)
        routed.copy_(drawn[memory.rank]), residual.copy_(drawn[-1])
        memory.synchronize()
        memory.barrier()
        if memory.rank == 1:
            time.sleep(LATE_SECONDS)
        found = run()
        memory.synchronize()
        expected = (2 * drawn[:-1]).sum(0) + (drawn[-1] + 1) @ weight
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        began, attended_at, summed_at = (stamps.double() * 1e-9).tolist()
        times += [attended_at - began, summed_at - began]
    return times


FORMS = [(form, rung) for form in (compiled, in_pieces) for rung in RUNGS] + [(captured, rung) for rung in GPU_RUNGS]


@pytest.mark.parametrize(
    ("form", "device"), [pytest.param(form, *rung.values, marks=rung.marks) for form, rung in FORMS]
)
def test_attention_ends_before_a_late_rank_gives_its_part_of_the_sum(form: Any, device: str) -> None:
    times, _ = run_ranks(run_late, 2, form, device=device)
    assert max(times[::2]) < LATE_SECONDS / 2 < min(times[1::2]), times
