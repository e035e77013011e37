"""What the benchmarks do without a GPU: refuse bad input, render and draw what a run has measured."""

import pytest
import torch

from farskip_fused.bench import decode, experts, gemms, peers, report, timing
from farskip_fused.bench.grouped_mm import grouped_mm_experts
from farskip_fused.bench.shapes import SHAPES, Shape, parse_shape, random_routing
from farskip_fused.errors import UsageError
from tests.numerics import DEVICE

SMALL = Shape(hidden=64, intermediate=32, experts=8, top_k=2)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no bfloat16 dot


def cell(ms):
    return {"ms": ms, "spread_ms": 0.01, "tflops": 1e3 / ms}


def made_up_report():
    layer = {
        "shape": "deepseek-v2-lite", "hidden": 2048, "intermediate": 1408, "experts": 64, "top_k": 6, "tokens": 4096,
        "routing": "uniform", "errors": {}, "saved_bytes": {"measured": 10**8, "formula": 9 * 10**7},
        "forward": {"dense": cell(2.0), "ours": cell(3.0), "grouped_mm": cell(4.5), "vllm": cell(6.0)},
        "forward_backward": {"dense": cell(6.0), "ours": cell(8.0), "grouped_mm": cell(9.0)},
    }  # fmt: skip
    decode = {"shape": "deepseek-v2-lite", "tokens": 8, "active_bytes": 1e9}
    decode |= {name: cell(0.4) | {"terabytes": 2.5} for name in ("ours", "vllm")}
    facts = {"gpu": "a GPU", "torch": torch.__version__}
    ceilings = {"tflops": 750.0, "terabytes": 3.0}
    return {
        "environment": facts, "missing": {"sonicmoe": "no module"}, "ceilings": ceilings, "layers": [layer],
        "decode": [decode],
    }  # fmt: skip


def test_tables_name_the_ratio_to_every_peer(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    report.render(made_up_report())
    printed = capsys.readouterr().out
    assert "1.50x" in printed and "2.00x" in printed and "1.12x" in printed
    assert "100.0 MB saved" in printed and "sonicmoe is left out: no module" in printed and "83%" in printed


def test_roofline_is_drawn(tmp_path):
    report.draw_roofline(made_up_report(), tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_best_peer_is_neither_ours_nor_the_limit():
    assert report.best_peer(made_up_report()["layers"][0]["forward"]) == 4.5


@pytest.mark.parametrize("name", ["no-such-model", "1,2,3", "64,64,2,3", "0,64,2,1"])
def test_unknown_shapes_are_refused(name):
    with pytest.raises(UsageError, match="Unknown shape"):
        parse_shape(name)


def test_named_and_numbered_shapes_are_read():
    assert parse_shape("qwen3-30b-a3b") == (2048, 768, 128, 8)
    assert parse_shape("64,32,8,2") == (64, 32, 8, 2)


def test_an_unknown_peer_is_refused_and_an_absent_one_named_with_its_command():
    with pytest.raises(UsageError, match="Unknown peer"):
        experts.run(["qwen3-30b-a3b"], [16], ["fastest"])
    names, missing = peers.available(["grouped_mm", "vllm"])
    assert "grouped_mm" in names
    assert "vllm" in names or "pip install vllm" in missing["vllm"]


@pytest.mark.skipif(DEVICE == "cuda", reason="says what a machine without a GPU answers")
def test_a_machine_without_a_gpu_is_refused():
    with pytest.raises(UsageError, match="measures a CUDA GPU"):
        experts.run(["qwen3-30b-a3b"], [16], [])


@pytest.mark.gpu
def test_a_small_shape_is_measured_with_its_peer():
    result = experts.run(["256,128,8,2"], [512], ["grouped_mm"])
    (layer,) = result["layers"]
    assert set(layer["forward"]) == {"dense", "ours", "grouped_mm"} == set(layer["forward_backward"])
    saved = layer["saved_bytes"]
    assert saved["formula"] <= saved["measured"] < saved["formula"] * 1.2 + 200_000


@pytest.fixture
def small_layer():
    layer = peers.make_experts(SMALL, 48, DEVICE, DTYPE)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn_like(weight) / weight.shape[-1] ** 0.5)
    return layer


@pytest.fixture
def clock(monkeypatch):
    """Every call takes 2 ms, whatever the device."""

    def once(calls, **_):
        for call in calls.values():
            call()
        return {name: timing.Timing(2.0, 0.1) for name in calls}

    def replay(calls):
        return lambda: [call() for call in calls]

    monkeypatch.setattr(timing, "interleave", once)
    monkeypatch.setattr(timing, "capture", replay)


def random_problem(layer, tokens=48):
    return peers.Problem.random(SMALL, tokens, layer.w13, layer.w2)


@pytest.mark.parametrize("backward", [False, True], ids=["output", "gradients"])
def test_grouped_mm_computes_what_ours_computes(small_layer, backward):
    peer, ours = peers.Peer(grouped_mm_experts), peers.as_peer(small_layer)
    assert peers.check("grouped_mm", peer, ours, random_problem(small_layer), backward) < peers.LARGEST_ERROR


@pytest.mark.parametrize("backward", [False, True], ids=["output", "gradients"])
def test_a_peer_with_interleaved_rows_is_checked_on_its_own_order(small_layer, backward):
    def deinterleaved(hidden_states, index, weights, w13, w2):
        return grouped_mm_experts(hidden_states, index, weights, torch.cat([w13[:, ::2], w13[:, 1::2]], dim=1), w2)

    ours = peers.as_peer(small_layer)
    peers.check("it", peers.Peer(deinterleaved, interleaved=True), ours, random_problem(small_layer), backward)
    with pytest.raises(RuntimeError, match="it and ours differ"):
        peers.check("it", peers.Peer(deinterleaved), ours, random_problem(small_layer), backward)


def test_a_wrong_gradient_of_a_peer_is_found(small_layer):
    def wrong(hidden_states, index, weights, w13, w2):
        return grouped_mm_experts(hidden_states, index, weights.detach() + 0 * weights, w13, w2)

    with pytest.raises(RuntimeError, match="differ"):
        peers.check("wrong", peers.Peer(wrong), peers.as_peer(small_layer), random_problem(small_layer), True)


def test_a_layer_is_measured_with_all_that_the_report_needs(small_layer, clock, monkeypatch, capsys):
    monkeypatch.setattr(experts, "make_experts", lambda *_: small_layer)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setenv("COLUMNS", "160")
    found, missing = {"grouped_mm": peers.Peer(grouped_mm_experts)}, {}
    (row,) = experts.measure("64,32,8,2", SMALL, [48], found, missing, skewed=True)
    assert not missing and row["zipf_over_uniform"] == {"forward": 1.0, "forward_backward": 1.0}
    for direction, factor in report.DIRECTIONS.items():
        assert set(row[direction]) == {"dense", "ours", "grouped_mm"}
        assert row[direction]["ours"]["tflops"] == pytest.approx(factor * 48 * 2 * 64 * 32 / 2.0 * 1e-9)
        assert row["errors"][direction]["grouped_mm"] < peers.LARGEST_ERROR
    report.render(made_up_report() | {"layers": [row], "decode": []})
    assert "1.00 x uniform" in capsys.readouterr().out


def test_what_is_saved_is_the_formula_and_indices(small_layer):
    problem = random_problem(small_layer)
    saved = experts.saved_bytes(SMALL, problem, peers.as_peer(small_layer))
    assert saved["formula"] == 2 * 48 * 64 + 4 * 48 * 2 * 32
    values = saved["measured"] - saved["indices"]
    assert saved["formula"] <= values <= saved["formula"] + 64 * 2 * 2 * 32  # ours may put 64 rows before its own
    assert 0 < saved["indices"] < 40 * problem.index.numel()


def test_running_out_of_memory_is_noted_and_not_raised(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    missing = {}
    with experts.leaving_out(missing, "deepseek-v3, T 16384"):
        raise torch.OutOfMemoryError
    assert missing == {"deepseek-v3, T 16384": "it does not fit into the GPU's memory"}


def test_every_kernel_of_the_layer_is_measured(small_layer, clock, monkeypatch, capsys):
    monkeypatch.setattr(gemms, "make_experts", lambda *_: small_layer)
    monkeypatch.setenv("COLUMNS", "160")
    rows = gemms.measure("64,32,8,2", SMALL, [48], skewed=False)
    products = {row["kernel"]: row["tflops"] * row["ms"] * 1e9 for row in rows if row["kernel"] != "router"}
    training = sum(flops for kernel, flops in products.items() if "inference" not in kernel)
    assert training * gemms.CALLS == pytest.approx(gemms.CALLS * SMALL.flops(48, "forward_backward"))
    assert all(row["ms"] == 2.0 / gemms.CALLS and row["terabytes"] > 0 for row in rows)
    report.render(made_up_report() | {"layers": [], "decode": [], "gemms": rows})
    assert "down gradient + dSwiGLU" in capsys.readouterr().out


def test_decode_reads_what_is_active_and_checks_vllm_first(small_layer, clock, monkeypatch):
    monkeypatch.setattr(decode, "make_copies", lambda *_: [small_layer] * 2)
    rows = decode.measure("64,32,8,2", SMALL, [1, 16], {"vllm": peers.Peer(grouped_mm_experts, trains=False)})
    assert rows[0]["active_bytes"] == SMALL.weight_bytes(SMALL.top_k)  # one token, distinct experts
    assert rows[0]["active_bytes"] <= rows[1]["active_bytes"] <= SMALL.weight_bytes(SMALL.experts)
    for row in rows:
        assert row["ours"]["ms"] == row["vllm"]["ms"] == 2.0 / decode.LEAST_CALLS
        assert row["vllm"]["error"] < peers.LARGEST_ERROR


@pytest.mark.parametrize("cache", [1, 50 * 2**20])
def test_rotated_copies_exceed_the_cache(cache):
    for shape in SHAPES.values():
        copies = decode.copies_needed(shape, cache)
        assert copies >= 2 and copies * shape.weight_bytes(shape.top_k) >= decode.CACHES * cache


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_random_routing_is_distinct_and_as_skewed_as_asked(skew):
    shape = Shape(hidden=8, intermediate=8, experts=64, top_k=6)
    index, weights = random_routing(shape, 4096, DEVICE, skew)
    assert index.dtype == torch.int32 and (index.sort(dim=-1).values.diff(dim=-1) > 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4096, device=DEVICE))
    loads = index.flatten().bincount(minlength=64).double()
    busiest = float(loads.max() / loads.mean())
    assert busiest > 4 if skew else busiest < 1.3


def test_the_spread_is_half_the_range_between_the_quartiles():
    assert timing.summarise([1.0, 2.0, 3.0, 4.0, 50.0]) == timing.Timing(3.0, 1.0)


def test_decode_and_gemms_exclude_each_other():
    with pytest.raises(UsageError, match="one at a time"):
        experts.run(["qwen3-30b-a3b"], [16], [], decode=True, gemms=True)
