"""Dispatch by pull, which is not what the package ships: receivers load their rows from the source. For comparison.

Every source puts its rows into its own part of its own slot and says so; every receiver then loads those that its
experts need. Less symmetric memory than push needs (a slot of one rank's rows), and the receiver sets the order, but a
row is read and written twice: at the source, and on its way.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from farskip_fused.kernels.dispatch import WARPS, wait_rows, wait_to_send
from farskip_fused.kernels.launchable import Kernel
from farskip_fused.kernels.machine import INTERPRETED, padded
from farskip_fused.kernels.protocol import (
    DISPATCH_ROWS,
    MAX_TOKENS,
    RANK,
    ROWS_ARRIVAL,
    TICKET_FIRST_ROW,
    WORLD,
    Round,
    announce,
    is_alive,
    row_pointers,
)

ROWS_AT_ONCE = 128 if INTERPRETED else 32
COLUMNS_AT_ONCE = 1024


@Kernel
@triton.jit(do_not_specialize=["tokens"])
def _publish(context, ticket, rows, tokens, HIDDEN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr):
    rank = tl.load(context + RANK)
    first = tl.load(ticket + TICKET_FIRST_ROW) + rank * tl.load(context + MAX_TOKENS)
    if is_alive(context):
        for start in range(tl.program_id(0) * BLOCK_ROWS, tokens, tl.num_programs(0) * BLOCK_ROWS):
            token = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
            target = row_pointers(context, rank, DISPATCH_ROWS, first + token, HIDDEN, rows.dtype.element_ty)
            for column_start in range(0, HIDDEN, BLOCK_HIDDEN):
                column = column_start + tl.arange(0, BLOCK_HIDDEN)
                mask = (token < tokens)[:, None] & (column < HIDDEN)[None, :]
                values = tl.load(rows + token[:, None] * HIDDEN + column[None, :], mask=mask)
                tl.store(target[:, None] + column[None, :], values, mask=mask)


@Kernel
@triton.jit
def _pull(
    context, ticket, experts, kept,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    max_tokens = tl.load(context + MAX_TOKENS)
    rows = tl.load(context + WORLD) * max_tokens
    first = tl.load(ticket + TICKET_FIRST_ROW)
    k = tl.arange(0, TOP_K_PADDED)
    for start in range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        exists = (row < rows)[:, None] & (k < TOP_K)[None, :]
        wanted = tl.max(tl.load(experts + row[:, None] * TOP_K + k[None, :], mask=exists, other=-1), axis=1) >= 0
        peer = tl.where(wanted, row // max_tokens, 0)
        source = row_pointers(context, peer, DISPATCH_ROWS, first + row, HIDDEN, kept.dtype.element_ty)
        for column_start in range(0, HIDDEN, BLOCK_HIDDEN):
            column = column_start + tl.arange(0, BLOCK_HIDDEN)
            mask = wanted[:, None] & (column < HIDDEN)[None, :]
            values = tl.load(source[:, None] + column[None, :], mask=mask)
            tl.store(kept + row[:, None] * HIDDEN + column[None, :], values, mask=mask)


def dispatch_by_pull(round_: Round, rows: Tensor, experts: Tensor, kept: Tensor) -> None:
    """Bring rows [T, H] of all ranks into ``kept`` [R, H] where ``experts`` [R, K] has a local expert for them."""
    hidden, top_k = rows.shape[1], experts.shape[1]
    blocks = {"BLOCK_ROWS": ROWS_AT_ONCE, "BLOCK_HIDDEN": min(padded(hidden), COLUMNS_AT_ONCE), "num_warps": WARPS}
    wait_to_send(round_)
    _publish[(round_.programs,)](round_.context, round_.ticket, rows, rows.shape[0], HIDDEN=hidden, **blocks)
    announce(round_, ROWS_ARRIVAL)
    wait_rows(round_)
    _pull[(round_.programs,)](
        round_.context, round_.ticket, experts, kept,
        HIDDEN=hidden, TOP_K=top_k, TOP_K_PADDED=padded(top_k), **blocks,
    )  # fmt: skip
