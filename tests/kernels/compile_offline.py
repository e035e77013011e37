"""Compiles the kernels for sm_90 without a GPU and prints what came out, as JSON; run by test_compiles.py.

The launchers run as they are, on memory of the CPU, so that what is compiled is what they choose: stubs answer which
GPU there is, and a launch compiles and goes no further.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

if __name__ == "__main__":
    # Before the kernels are imported: without a GPU they would be interpreted.
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda _=None: (9, 0)
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(
        shared_memory_per_block_optin=SHARED_MEMORY_LIMIT, multi_processor_count=MULTIPROCESSORS
    )
    torch.Tensor.is_cuda = True  # type: ignore[misc]

from farskip_fused.kernels import (
    all_reduce,
    combine,
    dispatch,
    experts,
    experts_backward,
    gather_sum,
    hopper,
    layout,
    put,
    routing,
)
from farskip_fused.kernels.combine import Extras
from farskip_fused.kernels.dispatch import SendOrder
from farskip_fused.kernels.experts_to_owner import project_to_owner
from farskip_fused.kernels.layout import Layout
from farskip_fused.kernels.protocol import ROWS_ARRIVAL, Round, SlotRows

SHARED_MEMORY_LIMIT = 232448  # bytes a block, compute capability 9.0
MULTIPROCESSORS = 132
EXPERTS, INTERMEDIATE, HIDDEN, TOP_K, TOKENS = 4, 1408, 2048, 6, 256
# LLVM's assembly.
NVSHMEM = """target triple = "nvptx64-nvidia-cuda"
define i32 @nvshmemx_putmem_nbi_warp(i64 %target, i64 %source, i64 %nbytes, i32 %peer) noinline { ret i32 0 }
define i32 @nvshmem_putmem_nbi(i64 %target, i64 %source, i64 %nbytes, i32 %peer) noinline { ret i32 0 }
define i32 @nvshmemx_signal_op(i64 %target, i64 %value, i32 %operation, i32 %peer) noinline { ret i32 0 }
define i32 @nvshmem_quiet() noinline { ret i32 0 }
"""
Step = Callable[[], Any]


class StubDriver:
    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_MEMORY_LIMIT, "multiprocessor_count": MULTIPROCESSORS, "warpSize": 32}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def expert_steps(
    dtype: torch.dtype, where: Layout, forms: Sequence[tuple[int | None, bool, bool]]
) -> Iterator[tuple[str, Step]]:
    """Every launcher of the expert GEMMs over that layout; ``forms`` of the first: top_k, kept, transposed."""
    entries = TOKENS * TOP_K
    rows = torch.empty(TOKENS, HIDDEN, dtype=dtype)
    weights = torch.empty(TOKENS, TOP_K)
    gate_up, activated = (hopper.new_rows(rows, entries, size) for size in (2 * INTERMEDIATE, INTERMEDIATE))
    w13 = torch.empty(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=dtype)
    w2 = torch.empty(EXPERTS, HIDDEN, INTERMEDIATE, dtype=dtype)

    def to_up(top_k: int | None, keep: bool, transposed: bool) -> tuple[Any, ...]:
        return top_k, w13.reshape(EXPERTS, HIDDEN, -1) if transposed else w13, keep, transposed

    for form in forms:
        yield f"form={form}", lambda form=form: experts.up_swiglu(rows, where, *to_up(*form))
    yield "down", lambda: experts.project(activated, where, w2, 1)
    if not where.is_sorted:
        return
    yield "up", lambda: experts.project(gate_up, where, w13, 2)
    for transposed in (False, True):
        weight = w2.reshape(EXPERTS, INTERMEDIATE, HIDDEN) if transposed else w2
        yield (
            f"through down transposed={transposed}",
            lambda a=(rows, weights, where, weight, gate_up, transposed): experts_backward.down_gradient_swiglu(*a),
        )
    for left, right, gather_left in ((gate_up, rows, False), (rows, activated, True)):
        shape = (EXPERTS, left.shape[1], right.shape[1])
        for into in (None, torch.float32, dtype):
            main_grad = None if into is None else torch.empty(shape, dtype=into)
            yield (
                f"gather_left={gather_left} into={into}",
                lambda a=(left, right, where, TOP_K, gather_left, main_grad): experts_backward.weight_gradient(*a),
            )


def other_steps(dtype: torch.dtype) -> Iterator[tuple[str, Step]]:
    """Sums and copies; layouts from ids of either width."""
    where = new_layout(128)
    rows, values = torch.empty(TOKENS, HIDDEN, dtype=dtype), torch.empty(TOKENS * TOP_K, HIDDEN, dtype=dtype)
    weights, parts = torch.empty(TOKENS, TOP_K), torch.empty(TOKENS * TOP_K, 6)
    yield "weighted", lambda: gather_sum.sum_entries(values, where.places, weights)
    yield "unsorted", lambda: gather_sum.sum_entries(values, where.places, weights, EXPERTS)
    yield "plain", lambda: gather_sum.sum_entries(values, where.places, None)
    yield "parts", lambda: gather_sum.sum_parts(parts, where.places)
    yield "copy", lambda: gather_sum.gather_rows(rows, where.order, where.offsets, TOP_K)
    if dtype != torch.bfloat16:
        return
    for tokens, index_dtype in ((8, torch.int64), (256, torch.int32), (4096, torch.int64)):
        ids = torch.empty(tokens, 8, dtype=index_dtype)
        yield f"T={tokens} {index_dtype}", lambda ids=ids: layout.local_layout(ids, 128, 128)


# Qwen3-30B-A3B, and DeepSeek-V3 (sigmoid, bias, groups) with its gate in float32, whose products are three of tf32.
ROUTERS = {
    "qwen3": (128, 8, None, {"sigmoid": False, "normalise": True, "groups": 1, "top_groups": 1}),
    "deepseek-v3": (256, 8, torch.float32, {"sigmoid": True, "normalise": True, "groups": 8, "top_groups": 4}),
}
FEW_TOKENS, MANY_TOKENS = (1, 64), (1024, 4096, 16384)  # each with another tile


def routing_steps(dtype: torch.dtype) -> Iterator[tuple[str, Step]]:
    """The router; of float16 only the products with the gate, which are all that depends on the dtype."""
    for name, (num_experts, top_k, gate_dtype, options) in ROUTERS.items():
        bias = torch.empty(num_experts) if options["sigmoid"] else None
        for tokens in FEW_TOKENS + MANY_TOKENS:
            x = torch.empty(tokens, HIDDEN, dtype=dtype)
            gate = torch.empty(num_experts, HIDDEN, dtype=gate_dtype or dtype)

            def run(x=x, gate=gate, top_k=top_k, bias=bias, options=options):
                found = routing.route(x, gate, top_k, scaling=2.5, bias=bias, tile_rows=128, **options)
                choice = {name: options[name] for name in ("sigmoid", "normalise")}
                routing.route_backward(found[2], found[0], found[1], scaling=2.5, **choice)

            if dtype == torch.bfloat16:
                yield f"{name} T={tokens}", run
            elif gate_dtype is None and tokens in MANY_TOKENS:
                options_of = {**options, "scaling": 2.5, "bias": bias, "tile_rows": 0}
                yield f"{name} T={tokens}", lambda a=(x, gate, top_k), o=options_of: routing.route(*a, **o)
            elif tokens == 1:
                yield name, lambda x=x, gate=gate: routing.split_logits(x, gate, 1)


def new_layout(tile_rows: int) -> Layout:
    index = torch.empty(TOKENS, TOP_K, dtype=torch.int32)
    if tile_rows == 1:
        return layout.unsorted_layout(index)
    return layout.empty_layout(index, EXPERTS, index.numel(), tile_rows)


def hopper_steps(dtype: torch.dtype) -> Iterator[tuple[str, Step]]:
    if hopper.HAS_GLUON:
        forms = [*itertools.product((TOP_K, None), (True, False), (False, True))]
        # The other dtype differs in one field of an instruction: each option once is enough there.
        is_bfloat16 = dtype == torch.bfloat16
        yield from expert_steps(dtype, new_layout(128), forms if is_bfloat16 else [forms[0], forms[3], forms[-1]])


def plain_steps(dtype: torch.dtype) -> Iterator[tuple[str, Step]]:
    hopper.HAS_GLUON = False
    for rows in (1, 16, 32, 64, 128) if dtype == torch.bfloat16 else (16, 128):
        forms = [(TOP_K, True, False), (TOP_K if rows == 1 else None, False, True)]
        for name, step in expert_steps(dtype, new_layout(rows), forms):
            yield f"rows={rows} {name}", step


INSTRUCTIONS = {"warpgroup": "wgmma.mma_async", "warp": "mma.sync", "descriptor": "cp.async.bulk.tensor"}


def describe(kernel: Any) -> dict[str, int]:
    """Tensor-core instructions of a warpgroup and of a warp, loads through descriptors; bytes of a thread's own memory,
    where registers are spilled to, and of a block's shared memory; calls of a library on blocks, and whether all those
    blocks have a value a thread.
    """
    found = {name: len(re.findall(rf"\b{re.escape(text)}\b", kernel.asm["ptx"])) for name, text in INSTRUCTIONS.items()}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        # Disassembling it would take as long as compiling it.
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    spilled = sum(int(found) for found in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage))
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", kernel.asm["ttgir"], re.MULTILINE))
    calls = [line for line in kernel.asm["ttgir"].splitlines() if "tt.extern_elementwise" in line and "tensor<" in line]
    value_a_thread = f"warpsPerCTA = [{kernel.metadata.num_warps}], order = [0]}}>"
    value_a_thread = f"#ttg.blocked<{{sizePerThread = [1], threadsPerWarp = [32], {value_a_thread}"
    called = [each for line in calls for each in re.findall(r", (#\w+)>", line)]
    return found | {
        "spilled": spilled,
        "shared": kernel.metadata.shared,
        "library_calls": len(calls),
        "value_a_thread": len(called) >= len(calls) and all(layouts[each] == value_a_thread for each in called),
    }


def exchange_steps(dtype: torch.dtype) -> Iterator[tuple[str, Step]]:
    """Between ranks: what is sent, awaited and summed, and the GEMMs that gather from a slot or store at owners."""
    if dtype != torch.bfloat16:  # float16 takes the same room
        return
    context, ids = torch.empty(64, dtype=torch.int64), torch.empty(TOKENS, TOP_K, dtype=torch.int32)
    weights, rows = torch.empty(TOKENS, TOP_K), torch.empty(TOKENS, HIDDEN, dtype=dtype)
    where = new_layout(128)
    turns, parts = torch.empty(TOKENS, dtype=torch.int32), torch.empty(TOKENS * TOP_K, 6)
    gate_up, activated = (hopper.new_rows(rows, TOKENS * TOP_K, size) for size in (2 * INTERMEDIATE, INTERMEDIATE))
    values = hopper.new_rows(rows, TOKENS * TOP_K, HIDDEN)
    w13 = torch.empty(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=dtype)
    w2 = torch.empty(EXPERTS, HIDDEN, INTERMEDIATE, dtype=dtype)
    order = dispatch.SendOrder(ids, where.order, where.offsets[-1:])
    for paced in (False, True):
        round_ = Round(context, context, 4, 8, paced)
        for fp8 in (False, True):
            yield f"{paced=} {fp8=}", lambda r=round_, f=fp8: dispatch.send_rows(r, rows, order, EXPERTS, fp8=f)
        yield f"{paced=} sums", lambda r=round_: combine.push_sums(r, values, where.places, weights, turns, TOP_K)
        for column_dim, inputs, weight in ((1, activated, w2), (2, gate_up, w13)):
            a = (round_, inputs, where, TOP_K, weight, column_dim, 124)
            yield f"{paced=} column_dim={column_dim}", lambda a=a: project_to_owner(*a)
    round_ = Round(context, context, 4, 8)
    # Of 16 experts and fewer, Triton 3.5 keeps a word of the sort's on the stack.
    yield "routing", lambda: dispatch.send_routing(round_._replace(world=16), ids, weights, EXPERTS)
    yield "orders", lambda: dispatch.load_orders(torch.device("cpu"), 16 * EXPERTS)
    yield "receive", lambda: dispatch.receive_routing(round_, TOKENS // 4, TOP_K, EXPERTS, TOKENS * TOP_K, 128)
    for fp8 in (False, True):
        yield f"{fp8=}", lambda f=fp8: dispatch.keep_rows(round_, ids, rows, fp8=f)
    yield "poison", lambda: dispatch.poison_if_failed(context, gate_up, activated)
    yield "turns", lambda: combine.find_turns(round_, ids, EXPERTS)
    yield "plain sums", lambda: combine.push_sums(round_, values, where.places, None, turns, TOP_K)
    yield "scalars", lambda: combine.push_weight_gradients(round_, parts, where.places)
    yield "scalars", lambda: combine.take_weight_gradients(round_, ids)
    yield "credit", lambda: combine.wait_to_send(round_)
    yield "release", lambda: dispatch.release(round_)
    for then_send in (False, True):
        yield f"{then_send=}", lambda then_send=then_send: dispatch.release_arrived(round_, then_send)
    for extras in (Extras(), Extras(rows, rows), Extras(rows, None, rows[0], 1e-6)):
        for form in ((weights, 0), (None, 0), (None, EXPERTS)):
            a = (round_, ids, form[0], HIDDEN, dtype, form[1], extras)
            yield f"wait presummed_by={form[1]}", lambda a=a: combine.combine_wait(*a)
    for paced, two_shot in itertools.product((False, True), repeat=2):
        for addends in (rows, torch.empty(TOKENS, HIDDEN - 2, dtype=dtype), torch.empty(TOKENS, HIDDEN)):
            shape = addends.shape[1], addends.itemsize
            reducer = all_reduce.Reducer(context, 4, 8, MULTIPROCESSORS, 4096, *shape, paced)
            a = (reducer.start, context, addends, two_shot, None)
            yield f"{paced=} {two_shot=}", lambda a=a: a[0](*a[1:])
            for residual in (None, addends) if not paced else ():
                a = (reducer.finish, context, addends, residual, two_shot, torch.empty_like(addends))
                yield f"{two_shot=}", lambda a=a: a[0](*a[1:])
    slots = [SlotRows(round_), SlotRows(round_, arrived=True)]
    yield (
        "weighted",
        lambda: gather_sum.gather_weighted_rows(slots[0], rows, where.order, where.offsets, weights, values),
    )
    for with_gluon in (True, False) if hopper.HAS_GLUON else (False,):
        for slot in slots:
            name = f"gluon={with_gluon} arrived={slot.arrived}"

            def run(slot=slot, with_gluon=with_gluon):
                hopper.HAS_GLUON = with_gluon
                project_to_owner(slot.round_, activated, where, TOP_K, w2, 1, 124)
                for keep in (True, False):
                    experts.up_swiglu(rows, where, TOP_K, w13, keep, slot=slot, programs=124)
                experts_backward.down_gradient_swiglu(rows, weights, where, w2, gate_up, slot=slot, programs=124)
                experts_backward.weight_gradient(gate_up, rows, where, TOP_K, False, slot=slot, programs=124)

            yield name, run


def put_steps(dtype: torch.dtype) -> Iterator[tuple[str, Step]]:
    """Puts, which know no dtype, over a library in which NVSHMEM's functions do nothing."""
    if dtype != torch.bfloat16:
        return
    context, ids = torch.empty(64, dtype=torch.int64), torch.empty(TOKENS, TOP_K, dtype=torch.int32)
    order, turns = ids.flatten(), torch.empty(TOKENS, dtype=torch.int32)
    rows, weights = torch.empty(TOKENS, HIDDEN, dtype=dtype), torch.empty(TOKENS, TOP_K)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "nvshmem.ll"
        library.write_text(NVSHMEM)
        for paced in (False, True):
            round_ = Round(context, context, 4, 8, paced, {"extern_libs": (("nvshmem", str(library)),)})
            for fp8 in (False, True):
                a, options = (round_, rows, SendOrder(ids, order, order[:1]), EXPERTS), {"fp8": fp8}
                yield f"{paced=} {fp8=}", lambda a=a, options=options: dispatch.send_rows(*a, **options)
            for each in (weights, None):
                a = (round_, rows, ids, each, turns, TOP_K)
                yield f"{paced=} weighted={each is not None}", lambda a=a: combine.push_sums(*a)
        yield "routing", lambda: put.put_routing(round_, TOKENS * TOP_K, TOP_K)
        yield "scalars", lambda: put.put_scalars(round_, ids)
        yield "signal", lambda: put.signal(round_, ROWS_ARRIVAL, 0)


def compile_family(dtype_name: str, family: str) -> list[dict[str, Any]]:
    """One row for each variant that the launches of that family differ in."""
    driver.set_active(StubDriver())
    rows: list[dict[str, Any]] = []
    compiled = set()

    def compile_only(function: JITFunction, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            kernel = function.warmup(*arguments, grid=grid, **options)
            if id(kernel) not in compiled:
                compiled.add(id(kernel))
                rows.append(
                    {
                        "name": f"{dtype_name} {name}: {function.__name__}",
                        "kernel": function.__name__,
                        **describe(kernel),
                    }
                )

        return launch

    JITFunction.__getitem__ = compile_only
    families = {
        "routing": routing_steps, "hopper": hopper_steps, "plain": plain_steps, "others": other_steps,
        "exchange": exchange_steps, "puts": put_steps,
    }  # fmt: skip
    for name, step in families[family](getattr(torch, dtype_name)):  # noqa: B007
        step()
    return rows


def main() -> None:
    # The longest first, so that the two processes end together.
    families = itertools.product(sys.argv[1:], ("exchange", "routing", "hopper", "plain", "others", "puts"))
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        rows = [row for found in pool.starmap(compile_family, families, chunksize=1) for row in found]
    print(json.dumps({"triton": triton.__version__, "gluon": hopper.HAS_GLUON, "variants": rows}))


if __name__ == "__main__":
    main()
