"""Measured choices: which row counts for a call, what it changes, what it costs to look, and how rows are found."""

import json
import statistics
import time

import pytest
import torch

import farskip_fused as ff
from farskip_fused import local_experts, tuning
from farskip_fused.bench import tune
from farskip_fused.bench.shapes import SHAPES, Shape
from farskip_fused.bench.timing import Timing
from farskip_fused.kernels import tiles
from tests.numerics import DEVICE
from tests.test_local_experts import EXPERTS, HIDDEN, INTERMEDIATE, random_call


def row(entries, tile_rows=64, up=(32, 64, 4, 3), down=(16, 32, 4, 3), dtype="float32", **other):
    fields = {
        "device": tuning.device_name(), "dtype": dtype, "hidden": HIDDEN, "intermediate": INTERMEDIATE,
        "experts": EXPERTS, "entries": entries, "tile_rows": tile_rows, "up": up, "down": down, "sorted_copy": False,
    }  # fmt: skip
    return tuning.Row(**fields | other)


def choose(tokens, transposed=False, dtype=torch.float32):
    hidden_states, index, _, w13, _ = random_call(tokens, dtype, transposed)
    return tuning.choose(index.numel(), hidden_states, w13)


def test_without_a_row_the_rules_choose():
    hidden_states, _, _, w13, _ = random_call(20)
    with tuning.using([]):
        assert tuning.choose(60, hidden_states, w13) is None
        assert tuning.tile_rows(60, hidden_states, w13) == tiles.choose_tile_rows(60, EXPERTS, torch.float32)


def test_a_row_counts_for_its_shape_and_for_more_than_half_of_its_entries():
    others = [row(64, **{name: 7}) for name in ("hidden", "intermediate", "experts")]
    others += [row(64, device="another"), row(64, dtype="bfloat16")]
    with tuning.using([*others, row(128, 32), row(64, 16), row(64, 32)]):
        found = {tokens: choose(tokens) for tokens in (10, 11, 21, 22, 42, 43)}
        assert [choice and choice.tile_rows for choice in found.values()] == [None, 16, 16, 32, 32, None]
        assert choose(20, transposed=True) == found[21]
        assert choose(20, dtype=torch.float16) is None


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_the_kernels_are_launched_with_the_measured_blocks(tokens, transposed, monkeypatch):
    arguments = random_call(tokens, transposed=transposed)
    with torch.no_grad():
        expected = ff.fused_experts(*arguments, transposed=transposed)
        used = []
        choose_tile = tiles.choose_tile
        monkeypatch.setattr(local_experts.experts, "choose_tile", lambda *a: used.append(choose_tile(*a)) or used[-1])
        with tuning.using([row(padded) for padded in (4, 64)]):
            result = ff.fused_experts(*arguments, transposed=transposed)
    rows = 16 if tokens == 1 else 64
    assert used == [tiles.Tile(rows, 32, 64, 4, 3), tiles.Tile(rows, 16, 32, 4, 3)]
    torch.testing.assert_close(result, expected)


def test_torch_compile_takes_a_measured_choice_whole():
    compiled = torch.compile(ff.fused_experts, fullgraph=True, backend="aot_eager", dynamic=True)
    arguments = [tensor.detach() for tensor in random_call(20)]
    with tuning.using([row(64)]):
        assert torch.equal(compiled(*arguments), ff.fused_experts(*arguments))


def test_choosing_costs_less_than_20_microseconds_a_call():
    """With a table of every named shape and 16 sizes each; a call looks twice, for its layout and for its tiles."""
    rows = [
        row(2**power, hidden=shape.hidden, intermediate=shape.intermediate, experts=shape.experts, dtype="bfloat16")
        for shape in SHAPES.values()
        for power in range(16)
    ]
    shape = list(SHAPES.values())[-1]
    hidden_states = torch.empty(4096, shape.hidden, dtype=torch.bfloat16, device="meta")
    w13 = torch.empty(shape.experts, 2 * shape.intermediate, shape.hidden, dtype=torch.bfloat16, device="meta")
    times = []
    with tuning.using(rows):
        for _ in range(500):
            begin = time.perf_counter()
            tuning.tile_rows(2**15, hidden_states, w13)
            found = tuning.choose(2**15, hidden_states, w13)
            times.append(time.perf_counter() - begin)
    assert found is not None
    assert statistics.median(times) < 20e-6


def test_a_table_is_written_merged_and_read_from_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    tuning.write(path, [row(64, 16), row(128, 16)])
    tuning.write(path, [row(64, 32)])
    assert sorted(tuning.read(path)) == [row(64, 32), row(128, 16)]
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    monkeypatch.setattr(tuning, "_table", None)
    assert choose(20).tile_rows == 32


def test_the_shipped_table_can_be_read():
    assert isinstance(tuning.read(tuning.SHIPPED), list)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"rows": [{}]}', None,
        *(
            json.dumps({"rows": [row(64)._asdict() | change]})
            for change in ({"up": [64, 64, 4]}, {"tile_rows": 24}, {"dtype": "int8"}, {"down": [8, 64, 4, 3]})
        ),
    ],
)  # fmt: skip
def test_what_is_no_table_is_named(text, tmp_path):
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ff.UsageError, match=r"table\.json is no table of tuned choices"):
        tuning.read(path)


SHAPE = Shape(hidden=64, intermediate=32, experts=8, top_k=2)


def times_of(cost):
    return lambda choices: {choice: Timing(cost(choice), 0.001) for choice in choices}


def test_the_search_finds_the_fastest_of_each_choice():
    wanted = tuning.Choice(32, (64, 64, 4, 5), (32, 128, 4, 4), False)

    def cost(choice):
        return 1.0 + sum(mine != best for mine, best in zip(choice, wanted, strict=True))

    found = tune.search(SHAPE, 64, times_of(cost))
    assert found["fastest"] == wanted and found["ms"] == 1.0 and found["rule_ms"] > 1.0


def test_what_is_hardly_faster_is_no_row(tmp_path):
    found = tune.search(SHAPE, 64, times_of(lambda choice: 1.0 - 0.005 * (choice.tile_rows == 32)))
    assert found["fastest"] == found["rule"]
    tune.write(tmp_path / "table.json", {"it": SHAPE}, [{"shape": "it", "tokens": 64, **found}])
    assert tuning.read(tmp_path / "table.json") == []


def test_what_does_not_fit_is_passed_over():
    def time(choices):
        return {choice: Timing(1.0, 0.0) for choice in choices if choice == tune.rule(SHAPE, 64)}

    assert tune.search(SHAPE, 64, time)["fastest"] == tune.rule(SHAPE, 64)


def test_unsorted_entries_have_one_row_a_tile():
    seen = []
    tune.search(SHAPE, 1, lambda choices: seen.extend(choices) or times_of(lambda _: 1.0)(choices))
    assert {choice.tile_rows for choice in seen} == {tune.rule(SHAPE, 1).tile_rows}


def test_found_rows_are_written_for_this_device_and_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    found = tune.search(SHAPE, 5, times_of(lambda choice: 2.0 - (choice.up == (32, 128, 4, 4))))
    results = [{"shape": "it", "tokens": 5, **found}]
    path = tmp_path / "table.json"
    tune.write(path, {"it": SHAPE}, results)
    (written,) = tuning.read(path)
    assert written.device == tuning.device_name() and written.entries == 16 and written.up == (32, 128, 4, 4)
    tune.render(results, path)
    assert "100.0%" in capsys.readouterr().out


@pytest.mark.skipif(DEVICE == "cuda", reason="says what a machine without a GPU answers")
def test_tuning_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(ff.UsageError, match="measures a CUDA GPU"):
        tune.run(["qwen3-30b-a3b"], [1], tmp_path / "table.json")
    with pytest.raises(ff.UsageError, match="does not exist"):
        tune.run(["qwen3-30b-a3b"], [1], tmp_path / "no" / "table.json")
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(ff.UsageError, match="no table"):
        tune.run(["qwen3-30b-a3b"], [1], tmp_path / "table.json")


@pytest.mark.gpu
def test_a_small_shape_is_tuned(tmp_path):
    (result,) = tune.run(["256,128,8,2"], [4], tmp_path / "table.json")
    assert result["ms"] > 0
    assert len(tuning.read(tmp_path / "table.json")) == (result["fastest"] != result["rule"])
