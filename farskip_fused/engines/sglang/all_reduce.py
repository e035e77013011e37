"""A sum over the ranks of tensor parallelism in two halves; between ``start`` and ``finish`` something else runs.

Where it can, the sum runs by itself, through torch.distributed in the process group that SGLang has made. While a CUDA
graph is captured or torch.compile traces, it is SGLang's own sum, which ends before ``start`` returns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.distributed import get_tp_group, tensor_model_parallel_all_reduce
from torch import Tensor

_UNDER_WAY = "_farskip_sum"


def start(value: Tensor) -> Tensor:
    """Begins the sum of ``value`` over the ranks and returns where it will be, maybe ``value`` itself.

    Nobody may read it before ``finish``.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return value
    if torch.compiler.is_compiling() or (value.is_cuda and torch.cuda.is_current_stream_capturing()):
        return tensor_model_parallel_all_reduce(value)
    # An attribute, as SGLang itself marks what it leaves to be summed: the pair between two layers is all that travels.
    setattr(value, _UNDER_WAY, dist.all_reduce(value, group=group.device_group, async_op=True))
    return value


def finish(total: Tensor) -> None:
    """Waits until ``total``, from ``start``, holds the sum; nothing to do for what is complete."""
    work: Any = getattr(total, _UNDER_WAY, None)
    if work is not None:
        work.wait()
        delattr(total, _UNDER_WAY)
