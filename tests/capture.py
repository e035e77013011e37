"""CUDA graphs of passes between ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

import farskip_fused as ff

Found = TypeVar("Found")


def capture(memory: ff.SymmetricMemory, call: Callable[[], Found]) -> tuple[torch.cuda.CUDAGraph, Found]:
    """The graph of ``call``, and what it returned, which every replay overwrites; called once before, on every rank."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    memory.synchronize()
    memory.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return graph, found
