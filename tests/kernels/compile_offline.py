"""Compiles the expert kernels for sm_90 without a GPU and prints what came out, as JSON; run by test_compiles.py.

A stub in place of Triton's driver answers which GPU is asked for. Nothing is loaded or launched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

if __name__ == "__main__":
    # Before the kernels are imported: without a GPU they would be interpreted.
    torch.cuda.is_available = lambda: True

from farskip_fused.kernels import (
    experts,
    experts_backward,
    hopper,
    hopper_down_gradient,
    hopper_forward,
    hopper_to_owner,
    hopper_weight_gradient,
)
from farskip_fused.kernels.tiles import choose_tile

EXPERTS, INTERMEDIATE, HIDDEN, TOP_K, TOKENS = 4, 1408, 2048, 6, 256
SHARED_MEMORY_LIMIT = 232448  # bytes a block, compute capability 9.0


class StubDriver:
    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_MEMORY_LIMIT, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def hopper_variants(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Names and compiled Gluon kernels."""
    entries = TOKENS * TOP_K
    index, rows = torch.zeros(64, dtype=torch.int32), torch.zeros(TOKENS, HIDDEN, dtype=dtype)
    w13 = torch.zeros(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=dtype)
    w2 = torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE, dtype=dtype)
    gate_up, activated, output = (
        hopper.new_rows(rows, entries, size) for size in (2 * INTERMEDIATE, INTERMEDIATE, HIDDEN)
    )
    weights, parts = torch.zeros(TOKENS, TOP_K), torch.zeros(entries, 6)
    tile = {"STAGES": 3, "num_warps": 4, "grid": (132,)}
    rows_box = hopper.matrix(rows, hopper.TILE_ROWS, hopper.DEPTH)
    context = torch.zeros(64, dtype=torch.int64)
    for top_k, in_slot in ((TOP_K, False), (0, False), (TOP_K, True)):
        for keep in (True, False):
            yield (
                f"up_swiglu top_k={top_k} keep={keep} in_slot={in_slot}",
                hopper_forward.up_swiglu_kernel.warmup(
                    context, context, rows, rows_box, index, index, index,
                    hopper.matrix(w13, hopper.TILE_COLUMNS // 2, hopper.DEPTH), hopper.clipped(gate_up), activated,
                    HIDDEN=HIDDEN, INTERMEDIATE=INTERMEDIATE, TOP_K=top_k, KEEP=keep,
                    IN_SLOT=in_slot, AWAITED=in_slot, **tile,
                ),
            )  # fmt: skip
        yield (
            f"down_gradient top_k={top_k} in_slot={in_slot}",
            hopper_down_gradient.down_gradient_kernel.warmup(
                context, context, rows, rows_box, weights, index, index, index,
                hopper.matrix(w2, hopper.DEPTH, hopper.TILE_COLUMNS), hopper.matrix(gate_up, 32, hopper.CHUNK),
                gate_up, activated, parts,
                HIDDEN=HIDDEN, INTERMEDIATE=INTERMEDIATE, TOP_K=top_k, IN_SLOT=in_slot, AWAITED=in_slot, **tile,
            ),
        )  # fmt: skip
    for inputs, weight, transposed in ((activated, w2, False), (gate_up, w13, True)):
        box = (hopper.DEPTH, hopper.TILE_COLUMNS) if transposed else (hopper.TILE_COLUMNS, hopper.DEPTH)
        yield (
            f"project transposed={transposed}",
            hopper_forward.project_kernel.warmup(
                hopper.matrix(inputs, hopper.TILE_ROWS, hopper.DEPTH), index, index, hopper.matrix(weight, *box),
                hopper.clipped(output),
                DEPTH_SIZE=inputs.shape[1], COLUMNS=HIDDEN, TRANSPOSED=transposed, **tile,
            ),
        )  # fmt: skip
        for paced in (False, True):
            yield (
                f"project_to_owner transposed={transposed} paced={paced}",
                hopper_to_owner.project_to_owner_kernel.warmup(
                    context, context, hopper.matrix(inputs, hopper.TILE_ROWS, hopper.DEPTH), index, index, index,
                    hopper.matrix(weight, *box),
                    DEPTH_SIZE=inputs.shape[1], HIDDEN=HIDDEN, TRANSPOSED=transposed, TOP_K=TOP_K, PACED=paced, **tile,
                ),
            )  # fmt: skip
    for ordered, transposed in ((activated, False), (gate_up, True)):
        for main_dtype in (None, torch.float32, dtype):
            result = torch.zeros(EXPERTS, HIDDEN, ordered.shape[1], dtype=main_dtype or dtype)
            staged = result if main_dtype is None else ordered
            yield (
                f"weight_gradient transposed={transposed} into={main_dtype}",
                hopper_weight_gradient.weight_gradient_kernel.warmup(
                    context, rows, hopper.clipped(ordered, hopper.TILE_COLUMNS), index, index,
                    hopper.matrix(staged, hopper.CHUNK, hopper.CHUNK), result,
                    EXPERTS=EXPERTS, LEFT_SIZE=HIDDEN, RIGHT_SIZE=ordered.shape[1], TOP_K=TOP_K,
                    TRANSPOSED=transposed, ACCUMULATE=main_dtype is not None,
                    PLANE=-1 if main_dtype is None else 0, **tile,
                ),
            )  # fmt: skip


def plain_variants(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Names and compiled Triton kernels, for every number of tile rows."""
    index = torch.int32
    for rows in (16, 32, 64, 128):
        tile = choose_tile(rows, dtype)
        blocks = {
            "BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns, "BLOCK_DEPTH": tile.depth, "PRECISION": "tf32",
            "grid": (1,), **tile.launch,
        }  # fmt: skip
        yield (
            f"plain up_swiglu rows={rows}",
            experts._up_swiglu.warmup(
                dtype, torch.int64, index, index, index, dtype, dtype, dtype,
                HIDDEN=HIDDEN, INTERMEDIATE=INTERMEDIATE, TOP_K=TOP_K, KEEP=True, **blocks,
            ),
        )  # fmt: skip
        yield (
            f"plain project rows={rows}",
            experts._project.warmup(
                dtype, index, index, dtype, dtype,
                DEPTH_SIZE=INTERMEDIATE, COLUMNS=HIDDEN, COLUMN_STRIDE=INTERMEDIATE, DEPTH_STRIDE=1, **blocks,
            ),
        )  # fmt: skip
        blocks["BLOCK_COLUMNS"] = experts_backward.down_gradient_tile(rows, dtype).columns
        yield (
            f"plain down_gradient rows={rows}",
            experts_backward._down_gradient_swiglu.warmup(
                dtype, torch.int64, torch.float32, index, index, index, dtype, dtype, dtype, dtype, torch.float32,
                HIDDEN=HIDDEN, INTERMEDIATE=INTERMEDIATE, TOP_K=TOP_K, COLUMN_TILES=11, **blocks,
            ),
        )  # fmt: skip


def describe(kernel: Any) -> dict[str, int]:
    """Tensor-core instructions of a warpgroup and of a warp, spills and reloads, bytes of shared memory."""
    sass = kernel.asm["sass"]
    found = {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HGMMA", "HMMA", "STL", "LDL", "UTMALDG")}
    return found | {"shared": kernel.metadata.shared}


def main() -> None:
    driver.set_active(StubDriver())
    report: dict[str, Any] = {"triton": triton.__version__, "gluon": hopper.HAS_GLUON, "variants": {}}
    for dtype in (torch.bfloat16, torch.float16):
        variants = plain_variants(dtype)
        for name, kernel in variants:
            report["variants"][f"{dtype} {name}"] = describe(kernel)
        if hopper.HAS_GLUON:
            for name, kernel in hopper_variants(dtype):
                report["variants"][f"{dtype} hopper {name}"] = describe(kernel)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
