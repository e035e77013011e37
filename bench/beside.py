"""`python -m farskip_fused.bench.beside`: GEMMs of cuBLAS, as attention and shared experts need them, beside a kernel
that keeps as many multiprocessors busy as communication takes; told of it and not (``kernels/library_gemms.py``).
"""

from __future__ import annotations

import torch
from rich.table import Table

from farskip_fused import _C
from farskip_fused.bench.report import environment, open_console
from farskip_fused.bench.timing import Timing, summarise
from farskip_fused.exchange_setup import share_multiprocessors
from farskip_fused.kernels.library_gemms import Busy

TOKENS, ROUNDS, CALLS = 4096, 30, 2
BUSY_MICROSECONDS = 600
# [in, out] of DeepSeek-V2-Lite's and Qwen3-30B-A3B's dense projections and V2-Lite's shared experts.
SHAPES = (
    (2048, 2048), (2048, 3072), (2048, 576), (512, 4096), (2048, 5632), (2816, 2048), (4096, 2048), (2048, 5120),
)  # fmt: skip


def measure(inputs: int, outputs: int, busy: int, told: int) -> Timing:
    """ms of one product of [TOKENS, inputs] beside so many busy multiprocessors, where cuBLAS is told of ``told``."""
    x = torch.randn(TOKENS, inputs, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream(priority=-1)
    times = []
    told_of = Busy(told)
    try:
        for _ in range(ROUNDS + 2):
            torch.cuda.synchronize()
            if busy:
                _C.hold(side.cuda_stream, busy, BUSY_MICROSECONDS, exclusive=True)
                torch.cuda._sleep(40_000)  # until they are
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                torch.nn.functional.linear(x, w)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / CALLS)
    finally:
        told_of.end()
    return summarise(times[2:])


def main() -> None:
    busy, _ = share_multiprocessors(torch.device("cuda"), None)
    console = open_console({"environment": environment()})
    console.print(f"products of {TOKENS} rows, bf16, µs ± spread; {busy} multiprocessors busy, cuBLAS told of {busy}")
    table = Table("in", "out", "alone", "busy", "busy, told", "told, nothing beside")
    for inputs, outputs in SHAPES:
        times = [measure(inputs, outputs, *way) for way in ((0, 0), (busy, 0), (busy, busy), (0, busy))]
        cells = (f"{time.ms * 1e3:.1f} ± {time.spread_ms * 1e3:.1f}" for time in times)
        table.add_row(str(inputs), str(outputs), *cells)
    console.print(table)


if __name__ == "__main__":
    main()
