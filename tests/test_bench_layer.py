"""What `farskip bench layer` counts, prints, draws and refuses; its attention; its stacks on CPU ranks."""

import json
from dataclasses import replace

import pytest
import torch

import farskip_fused as ff
from farskip_fused.bench import layer, layer_trace
from farskip_fused.bench.attention import Core, GroupedSizes, LatentSizes, make_attention
from farskip_fused.bench.layer_ranks import DIRECTIONS, SHORT, Case, LayerShape, Measured, Stack, measure
from farskip_fused.bench.layer_trace import TRACED, Interval
from farskip_fused.bench.layer_ways import OVERLAPPED, WAYS
from farskip_fused.bench.nccl_ways import NCCL_WAYS
from farskip_fused.bench.shapes import Shape
from farskip_fused.cli import main
from farskip_fused.launch import run_ranks
from tests.numerics import assert_close

EXPERTS = Shape(32, 16, 8, 2)
LATENT = LayerShape(EXPERTS, LatentSizes(heads=2, latent=16, nope=8, rope=4, value=8), 16, normalise=False)
GROUPED = LayerShape(EXPERTS, GroupedSizes(heads=4, key_value_heads=2, width=8), 0, normalise=True)
CASE = Case(LATENT, tokens=24, length=12, sms=None, layers=3)


def rotated(x):
    """[L, width]: pairs of a column of either half, turned by position times frequency, as complex numbers."""
    first, second = x.chunk(2, dim=-1)
    width = x.shape[-1]
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turn = torch.polar(torch.ones_like(first), torch.arange(len(x))[:, None] * frequencies)
    turned = torch.complex(first, second) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


def head_output(query, key, value):
    """[L, .] each."""
    scores = query @ key.T / query.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ value


def plain_latent(attention, x):
    sizes = attention.sizes
    query = attention.query(x).unflatten(-1, (sizes.heads, -1))
    latent, shared = attention.compress(x).split([sizes.latent, sizes.rope], dim=-1)
    expanded = attention.expand(attention.norm(latent)).unflatten(-1, (sizes.heads, -1))
    outputs = []
    for head in range(sizes.heads):
        whole_query = torch.cat((query[:, head, : sizes.nope], rotated(query[:, head, sizes.nope :])), dim=-1)
        key = torch.cat((expanded[:, head, : sizes.nope], rotated(shared)), dim=-1)
        outputs.append(head_output(whole_query, key, expanded[:, head, sizes.nope :]))
    return attention.out(torch.cat(outputs, dim=-1))


def plain_grouped(attention, x):
    sizes = attention.sizes
    query, key, value = (
        part.unflatten(-1, (-1, sizes.width)) for part in attention.query_key_value(x).split(attention.widths, dim=-1)
    )
    query, key = attention.query_norm(query), attention.key_norm(key)
    outputs = []
    for head in range(sizes.heads):
        of = head * sizes.key_value_heads // sizes.heads
        outputs.append(head_output(rotated(query[:, head]), rotated(key[:, of]), value[:, of]))
    return attention.out(torch.cat(outputs, dim=-1))


@pytest.mark.parametrize(("shape", "plain"), [(LATENT, plain_latent), (GROUPED, plain_grouped)])
def test_attention_in_two_halves_is_that_of_each_head_and_sequence(shape, plain):
    length = 6
    attention = make_attention(32, shape.attention, length, device=torch.device("cpu"), dtype=torch.float64)
    x = torch.randn(2 * length, 32, dtype=torch.float64)
    attention.core = Core(*attention.project(x))
    expected = torch.cat([plain(attention, sequence) for sequence in x.split(length)])
    assert_close(attention.attend(attention.project(x)).float(), expected, torch.float32)


def of(per_layer, sent=0, difference=0.0):
    """Measured by one rank: every way takes 5 ms and what ``per_layer`` says, or 1 ms, for each layer."""
    times = {
        way: {layers: [5 + layers * per_layer.get(way, 1.0)] * 4 for layers in (SHORT, CASE.layers)} for way in WAYS
    }
    differences = {way: {"schedule": difference, "rounds": difference} for way in TRACED}
    return Measured(dict.fromkeys(DIRECTIONS, times), dict.fromkeys(OVERLAPPED, sent), differences, "torch", 2, 30)


def test_the_slowest_rank_counts_and_the_ends_of_a_stack_do_not():
    slow = {"blocking": 10.0, "computation": 6.0, "computation_all": 5.0, "paper": 8.0, "fused": 6.5, "window": 2.0}
    forward, both = layer.summary("tiny", CASE, "nvlink4", 1000, [of({"blocking": 3.0}, 10**6), of(slow, 7 * 10**6)])
    assert forward["blocking_ms"] == 10.0 and forward["window_ms"] == 2.0 and forward["collectives_ms"] == 1.0
    assert forward["fits"] and not layer.summary("tiny", CASE, "none", None, [of({"collectives": 1.1})])[0]["fits"]
    assert forward["paper_overlap"] == 0.5 and forward["fused_overlap"] == 0.875
    assert forward["fused_overlap_of_all"] == pytest.approx(0.7)
    assert forward["fused_speedup"] == pytest.approx(10 / 6.5)
    assert forward["fused_link_ms"] == 7.0 and both["fused_link_ms"] == 14.0
    assert forward["fused_ratio"] == pytest.approx(6.5 / 7) and both["fused_ratio"] == pytest.approx(6.5 / 14)


def test_where_blocking_is_no_slower_than_computation_there_is_no_overlap_to_speak_of(capsys):
    rows = layer.summary("tiny", CASE, "none", None, [of({})])
    assert all(row["paper_overlap"] is None and row["fused_link_ms"] is None for row in rows)
    layer.render({"environment": {}, "failed": {"tiny": "[why]"}, "rows": rows})
    printed = capsys.readouterr().out
    assert "tiny failed: [why]" in printed and "of no use" not in printed


@pytest.mark.parametrize("difference", [0.1, float("nan")])
def test_results_that_differ_are_said_to_be_of_no_use(capsys, difference):
    rows = layer.summary("tiny", CASE, "none", None, [of({}), of({}, difference=difference)])
    layer.render({"environment": {}, "failed": {}, "rows": rows})
    assert " ".join(capsys.readouterr().out.split()).count("of no use") == 2 * len(TRACED)


def test_networks_are_reached_by_puts():
    assert layer.parse_link("ib400") == (50.0, True) and layer.parse_link("ib200") == (25.0, True)
    assert layer.parse_link("none") == (None, False) and layer.parse_link("nvlink4") == (450.0, False)
    with pytest.raises(ff.UsageError, match="use none, nvlink4, ib400, ib200, or GB/s"):
        layer.parse_link("ib")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shapes": ["deepseek-v3"]}, "Unknown layer 'deepseek-v3'"),
        ({"ranks": [3]}, "64 experts, which do not divide over 3 ranks"),
        ({"tokens": [5000]}, "must be sequences of 4096"),
        ({"tokens": [1024, 4096], "figure": "layer.png"}, "2 were asked for"),
        ({"links": ["none", "nvlink4"], "trace": "trace.json"}, "2 were asked for"),
        ({"figure": "layer.txt"}, "must end in .png or .svg"),
        ({"trace": "nowhere/trace.json"}, "does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_rank_starts(change, reason, tmp_path):
    asked = {"shapes": ["deepseek-v2-lite"], "ranks": [2], "links": ["none"], "sms": [None], "tokens": [4096], **change}
    for name in ("trace", "figure"):
        if name in asked:
            asked[name] = tmp_path / asked[name]
    with pytest.raises(ff.UsageError, match=reason):
        layer.run(**asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_refuses_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "layer"])
    assert leaving.value.code == 2
    assert "measures a CUDA GPU" in capsys.readouterr().err


def annotation(name, stream, start, end, category="gpu_user_annotation"):
    return {"cat": category, "name": name, "tid": stream, "ts": start * 1e3, "dur": (end - start) * 1e3}


def test_intervals_are_the_kernels_of_each_action_and_other_streams_carry_transfers(tmp_path):
    events = [
        annotation("fused forward/1/start_dispatch", 20, 2.0, 4.0),
        annotation("fused forward/1/attention_core", 7, 1.0, 3.0),
        annotation("fused forward/1/attention_core", 99, 0.0, 9.0, "user_annotation"),
        annotation("fused forward_backward/1/attention_core", 7, 11.0, 12.0),
        annotation("ProfilerStep", 7, 0.0, 9.0),
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert layer_trace.read_intervals(tmp_path / "trace.json") == [
        Interval("fused", 1, "attention_core", False, 1.0, 3.0),
        Interval("fused", 1, "start_dispatch", True, 2.0, 4.0),
    ]


def test_a_layers_turn_lasts_until_the_attention_of_the_next_and_is_drawn(tmp_path):
    intervals = []
    for number, way in enumerate(TRACED):
        for index in range(5):
            start = index * (number + 1.0)
            intervals += [
                Interval(way, index, "attention_projections", False, start, start + 0.3),
                Interval(way, index, "experts", False, start + 0.4, start + 0.9),
                Interval(way, index, "start_dispatch", True, start + 0.2, start + 0.4),
            ]
    assert [layer_trace.turn(intervals, way) for way in TRACED] == [(2.0, 3.0), (4.0, 6.0), (6.0, 9.0)]
    layer_trace.draw(tmp_path / "layer.svg", intervals, "tiny")
    drawn = (tmp_path / "layer.svg").read_text()
    assert drawn.count("<svg") == 1 and len(drawn) > 10_000


def compare_on_rank(memory, way):
    return Stack(memory, replace(CASE, nccl=way in NCCL_WAYS)).difference(way, "fused", layers=1)


@pytest.mark.full
@pytest.mark.rung2
@pytest.mark.parametrize("way", ["paper", *NCCL_WAYS])
def test_whole_collectives_give_the_plain_definition_and_its_gradients(way):
    assert max(run_ranks(compare_on_rank, 2, way)) < 1e-5


def sent():
    """Rows that each of two ranks sends: to its tokens' experts, and back from its experts, summed and one by one."""
    routed = [ids for _, ids in sorted(enumerate(run_ranks(routing_on_rank, 2)))]
    found = []
    for rank in range(2):
        away, back = routed[rank] // 4 != rank, routed[1 - rank] // 4 == rank
        found.append((int(away.any(1).sum()), int(back.any(1).sum()), int(back.sum())))
    return found


def routing_on_rank(memory):
    return Stack(memory, CASE).ids


@pytest.mark.full
@pytest.mark.rung2
@pytest.mark.timeout(900)
@pytest.mark.parametrize("by_put", [False, True], ids=["stores", "puts"])
@pytest.mark.parametrize("shape", [LATENT, GROUPED], ids=["latent", "grouped"])
def test_every_way_is_timed_equals_the_definition_and_is_traced(shape, by_put, tmp_path):
    case = Case(shape, CASE.tokens, CASE.length, None, CASE.layers, nccl=not by_put)
    trace = tmp_path / "trace.json"
    measured = run_ranks(measure, 2, case, 1000, 2, str(trace), by_put=by_put, limit=900.0)
    for one, (dispatched, sums, rows) in zip(measured, sent(), strict=True):
        assert set(one.times) == set(DIRECTIONS)
        assert all(set(ways) == {*WAYS, *(() if by_put else NCCL_WAYS)} for ways in one.times.values())
        for by_layers in (by_layers for ways in one.times.values() for by_layers in ways.values()):
            assert set(by_layers) == {SHORT, case.layers} and all(len(times) == 2 for times in by_layers.values())
        assert all(max(of.values()) < 1e-5 for of in one.differences.values())
        row = EXPERTS.hidden * 4
        assert one.sent == {
            "paper": (dispatched + sums) * row,
            "fused": (dispatched + (sums if by_put else rows)) * row,
        }
    report = {"environment": {}, "failed": {}, "rows": layer.summary("tiny", case, "1", 1000, measured)}
    layer.render(report)
    assert json.loads(json.dumps(report)) == report
    # On CPU there are the host's calls alone, all on one thread.
    intervals = layer_trace.read_intervals(trace, category="user_annotation")
    for way in TRACED:
        found = {(one.layer, one.action) for one in intervals if one.way == way}
        actions = {"attention_projections", "attention_core", "start_dispatch", "experts", "finish_combine"}
        actions |= {"shared_experts"} if shape.shared else set()
        assert found == {(number, action) for number in range(case.layers) for action in actions}
    layer_trace.draw(tmp_path / "layer.png", intervals, "tiny")
    assert (tmp_path / "layer.png").stat().st_size > 10_000
