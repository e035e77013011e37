"""What every rank of `farskip bench all-reduce` runs: our two forms, and others' all-reduces with a GPU a rank.

Multicast stays off in all of them: NVLink SHARP sums in the switch, which needs hardware and rights that most have not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farskip_fused.all_reduce import ANY_MESSAGE, AllReduce
from farskip_fused.bench.collectives import Refused, capture, synchronize, time_call, together
from farskip_fused.bench.shapes import BYTES
from farskip_fused.symmetric import SymmetricMemory

ONE_SHOT, TWO_SHOTS = "one shot", "two shots"
FORMS = (ONE_SHOT, TWO_SHOTS)
NCCL = "torch's all_reduce over NCCL"
SYMMETRIC = "torch's symmetric-memory all-reduce"
Form = tuple[Callable[[Tensor], Tensor], Tensor]  # what sums addends over the ranks, and those it is given
LARGEST_ONE_SHOT = 2**27  # bytes; its slots hold a message from every rank


@dataclass(frozen=True)
class Case:
    """Rows [tokens, hidden] of every rank. sms: multiprocessors a rank that ours takes, 0 for others' own choice."""

    tokens: int
    hidden: int
    sms: int

    def has(self, form: str) -> bool:
        """Whether a message of this size is timed in that form."""
        return form == TWO_SHOTS or self.tokens * self.hidden * BYTES <= LARGEST_ONE_SHOT


@dataclass(frozen=True)
class Measured:
    """times: ms of each iteration, by form. captured: whether a CUDA graph was timed."""

    times: dict[str, list[float]]
    captured: bool


def measure(memory: SymmetricMemory, cases: list[Case], iterations: int) -> list[Measured]:
    """Ours in every case, on this rank."""
    made = {}
    for hidden, sms in {(case.hidden, case.sms): None for case in cases}:
        for form in FORMS:
            tokens = [case.tokens for case in cases if (case.hidden, case.sms) == (hidden, sms) and case.has(form)]
            if tokens:
                made[hidden, sms, form] = AllReduce(
                    memory, max_tokens=max(tokens), hidden_size=hidden, dtype=dtype_on(memory.device),
                    num_comm_sms=sms, one_shot_bytes=ANY_MESSAGE if form == ONE_SHOT else 0,
                )  # fmt: skip
                made[hidden, sms, form].setup()
    found = []
    for case in cases:
        addends = torch.empty(case.tokens, case.hidden, dtype=dtype_on(memory.device), device=memory.device)
        forms: dict[str, Form] = {
            form: (made[case.hidden, case.sms, form], addends) for form in FORMS if case.has(form)
        }
        found.append(_measure(memory.device, iterations, forms))
    return found


def measure_other(device: torch.device, name: str, cases: list[Case], iterations: int) -> list[Measured] | str:
    """Another library's in every case, on each rank; or on all ranks why it is not timed."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    found = []
    try:
        group = together(lambda: dist.new_group(backend="nccl") if device.type == "cuda" else dist.group.WORLD)
        for case in cases:
            forms = together(partial(OTHERS[name], device, case, group))
            found.append(_measure(device, iterations, forms))
    except Refused as refused:
        return str(refused)
    return found


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _nccl(device: torch.device, case: Case, group: Any) -> dict[str, Form]:
    def call(addends: Tensor) -> Tensor:
        dist.all_reduce(addends, group=group)
        return addends

    return {"": (call, torch.empty(case.tokens, case.hidden, dtype=dtype_on(device), device=device))}


kept: list[Tensor] = []  # of symmetric memory, whose freeing would be collective


def _symmetric(device: torch.device, case: Case, group: Any) -> dict[str, Form]:
    """Of torch's over its symmetric memory, in which the addends are taken to lie already."""
    from torch.distributed import _symmetric_memory as symmetric

    if device.type != "cuda":
        raise RuntimeError("torch's symmetric memory needs GPUs")
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    forms: dict[str, Form] = {}
    operators = {ONE_SHOT: torch.ops.symm_mem.one_shot_all_reduce, TWO_SHOTS: torch.ops.symm_mem.two_shot_all_reduce_}
    for form, operator in operators.items():
        if case.has(form):
            addends = symmetric.empty(case.tokens, case.hidden, dtype=dtype_on(device), device=device)
            symmetric.rendezvous(addends, name)
            kept.append(addends)
            forms[form] = (partial(_call_operator, operator, name), addends)
    return forms


def _call_operator(operator: Callable[..., Tensor], name: str, addends: Tensor) -> Tensor:
    return operator(addends, "sum", name)


OTHERS: dict[str, Callable[[torch.device, Case, Any], dict[str, Form]]] = {NCCL: _nccl, SYMMETRIC: _symmetric}


def _measure(device: torch.device, iterations: int, forms: dict[str, Form]) -> Measured:
    times, captured = {}, True
    for form, (call, addends) in forms.items():
        sums: list[Tensor] = [addends]

        def run(call: Any = call, addends: Tensor = addends, sums: list[Tensor] = sums) -> None:
            sums[0] = call(addends)

        addends.zero_()  # some overwrite theirs, and go on with what they got
        together(partial(_repeat, run, device))
        (replay,), is_captured = capture([run], device)
        together(partial(_check, addends, replay, sums))
        addends.zero_()
        times[form] = time_call(replay, replay, iterations, device, is_captured)
        captured &= is_captured
        dist.barrier()
    return Measured(times, captured)


def _repeat(run: Callable[[], None], device: torch.device) -> None:
    for _ in range(3):
        run()
    synchronize(device)


def _check(addends: Tensor, run: Callable[[], None], sums: list[Tensor]) -> None:
    """Integers whose sum is exact, another in each column."""
    world = dist.get_world_size()
    columns = torch.arange(addends.shape[1], device=addends.device) % 13
    addends.copy_((columns + dist.get_rank()).expand_as(addends))
    run()
    if not torch.equal(sums[0], (columns * world + world * (world - 1) // 2).expand_as(addends).to(addends.dtype)):
        raise RuntimeError("it does not give the sum of what all ranks have")
