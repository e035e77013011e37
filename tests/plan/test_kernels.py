"""Kernel times against the committed measurements of our kernels, and against the figures that they are taken from."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from farskip_fused.bench.shapes import SHAPES
from farskip_fused.kernels.layout import can_stay_unsorted
from farskip_fused.plan.clusters import CLUSTERS, H100_COPY, H100_MATMUL
from farskip_fused.plan.kernels import Machine

RESULTS = Path(__file__).parents[2] / "bench" / "results"
LAYERS = json.loads((RESULTS / "h100-experts-fine-grained.json").read_text())
# With so few entries that one rank leaves them unsorted, which ranks that exchange tokens never do, it is faster.
DECODE = [
    row for row in json.loads((RESULTS / "h100-experts-decode.json").read_text())["decode"]
    if not can_stay_unsorted(row["tokens"], SHAPES[row["shape"]].top_k, SHAPES[row["shape"]].experts)
]  # fmt: skip
H100 = Machine(CLUSTERS["h100-ib400"])


def names(rows):
    return [f"{row['shape']}-{row['tokens']}" for row in rows]


def predicted(row, active, backward=False):
    shape = SHAPES[row["shape"]]
    return H100.experts(row["tokens"] * shape.top_k, shape.hidden, shape.intermediate, active, backward=backward)


def test_ceilings_are_the_measured_ones():
    assert LAYERS["ceilings"]["tflops"] == pytest.approx(H100_MATMUL, rel=1e-3)
    assert LAYERS["ceilings"]["terabytes"] == pytest.approx(H100_COPY, rel=1e-3)


@pytest.mark.parametrize("row", LAYERS["layers"], ids=names(LAYERS["layers"]))
def test_expert_layers_take_what_was_measured(row):
    forward, both = (row[direction]["ours"]["ms"] for direction in ("forward", "forward_backward"))
    assert predicted(row, row["experts"]) == pytest.approx(forward, rel=0.06)
    assert predicted(row, row["experts"], backward=True) == pytest.approx(both - forward, rel=0.06)


@pytest.mark.parametrize("row", DECODE, ids=names(DECODE))
def test_decoding_expert_layers_take_what_was_measured(row):
    active = row["active_bytes"] / SHAPES[row["shape"]].weight_bytes(1)
    assert predicted(row, active) == pytest.approx(row["ours"]["ms"], rel=0.06)


@pytest.mark.parametrize("row", LAYERS["layers"], ids=names(LAYERS["layers"]))
def test_dense_products_take_what_was_measured(row):
    rows = row["tokens"] * row["top_k"]
    up = H100.matmul(rows, row["hidden"], 2 * row["intermediate"])
    down = H100.matmul(rows, row["intermediate"], row["hidden"])
    assert up + down == pytest.approx(row["forward"]["dense"]["ms"], rel=0.15)


def test_products_of_weight_gradients_take_what_was_measured():
    """Two GEMMs of each row's backward pass have a result of few tiles and an inner dimension as long as the rows."""
    for row in LAYERS["layers"]:
        shape, rows = SHAPES[row["shape"]], row["tokens"] * row["top_k"]
        sizes = ((shape.hidden, 2 * shape.intermediate), (shape.intermediate, shape.hidden))
        backward = sum(H100.linear(rows, *each, backward=True) for each in sizes)
        forward, both = (row[direction]["dense"]["ms"] for direction in ("forward", "forward_backward"))
        assert backward == pytest.approx(both - forward, rel=0.15)


def test_a_wave_that_is_hardly_begun_costs_a_whole_one():
    fits, exceeds = (H100.matmul(128 * rows, 4096, 256 * 11) for rows in (12, 13))  # 132 and 143 tiles
    assert 1.3 * fits < exceeds < 2 * fits


# Liger-Kernel, benchmark/data/all_benchmark_data.csv, stock PyTorch on an H100, ms by size.
SWIGLU = {4096: 0.1976, 8192: 0.3830, 16384: 0.7503, 32768: 1.4953}  # of 8192 rows, halves of one tensor
RMS_NORM = {1024: 0.0128, 2048: 0.0190, 4096: 0.0325, 8192: 0.0745, 16384: 0.1492}  # of 4096 rows


def test_elementwise_kernels_take_what_was_published():
    for columns, ms in SWIGLU.items():
        assert H100.strided(2 * 8192 * columns, 2) == pytest.approx(ms, rel=0.05)
    for columns, ms in RMS_NORM.items():
        assert H100.norm(4096 * columns) == pytest.approx(ms, rel=0.2)
    # Rotary embedding of transformers, kernels launched one by one: heads 32 and 8 of 256, 2048 tokens; a product, a
    # negated half, its concatenation, a product, a sum.
    assert 2 * H100.strided(4.5 * 2048 * 20 * 256, 5) == pytest.approx(0.337, rel=0.2)


def test_attention_is_at_most_as_fast_as_published():
    """FlashAttention-3, not causal: 430 to 621 TFLOP/s from 512 to 16384 tokens; causal is slower."""
    rates = [1e12 / H100.attention(1e12, length) * 1e-9 for length in (512, 1024, 2048, 4096, 8192, 16384)]
    assert all(before < after for before, after in pairwise(rates))
    published = (430, 517, 566, 590, 614, 621)
    assert all(rate < limit for rate, limit in zip(rates, published, strict=True))
    assert rates[-1] == pytest.approx(published[-1], rel=0.06)


def test_float8_is_faster_but_less_than_twice():
    half, quarter = H100.matmul(8192, 4096, 4096), Machine(H100.cluster, fp8=True).matmul(8192, 4096, 4096)
    assert half / 2 < quarter < half
