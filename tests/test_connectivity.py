"""The definition of FarSkip: names, layer expressions and the two streams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farskip_fused.connectivity import NAMES, Connectivity, Streams, advance, parse_layers
from farskip_fused.errors import UsageError

MODEL_SIZES = st.integers(1, 100)


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        ("farskip", True, True),
        ("attention_only", True, False),
        ("moe_only", False, True),
        ("standard", False, False),
    ],
)
def test_names_say_what_is_read(name: str, attention: bool, mlp: bool) -> None:
    connectivity = Connectivity.named(name)
    assert connectivity.attention_reads_partial is attention
    assert connectivity.mlp_reads_before_attention is mlp
    assert connectivity.name == name
    assert Connectivity.named(connectivity) is connectivity
    assert Connectivity(**connectivity.to_dict()) == connectivity


@pytest.mark.parametrize("name", ["FarSkip", "", "both", None])
def test_unknown_names_are_refused_with_those_known(name: Any) -> None:
    with pytest.raises(UsageError, match=r"Unknown connectivity .*; use one of " + ", ".join(NAMES)):
        Connectivity.named(name)


@pytest.mark.parametrize("depth", [0, 4, -1, 1.0])
def test_other_depths_are_refused(depth: Any) -> None:
    with pytest.raises(UsageError, match=f"depth {depth} was asked for; use 1 to 3"):
        Connectivity.farskip(depth)


@pytest.mark.parametrize("name", ["attention_only", "moe_only", "standard"])
def test_only_where_both_skip_can_it_go_deeper(name: str) -> None:
    assert Connectivity.farskip(depth=3).name == "farskip"
    with pytest.raises(UsageError, match="depth 2 is for farskip"):
        replace(Connectivity.named(name), depth=2)


@pytest.mark.parametrize(
    ("expression", "num_layers", "expected"),
    [
        ("all", 3, [0, 1, 2]),
        ("last:75%", 8, [2, 3, 4, 5, 6, 7]),
        ("last:50%", 5, [3, 4]),
        ("last:1%", 10, [9]),
        ("first:100%", 2, [0, 1]),
        ("first:4", 9, [0, 1, 2, 3]),
        ("last:4", 9, [5, 6, 7, 8]),
        ("4:7", 9, [4, 5, 6]),
        (2, 3, [2]),
        ([4, 0, 4], 5, [0, 4]),
        (range(1, 3), 5, [1, 2]),
        ((index for index in (3, 1)), 5, [1, 3]),
    ],
)
def test_expressions(expression: Any, num_layers: int, expected: list[int]) -> None:
    assert parse_layers(expression, num_layers) == expected


@pytest.mark.parametrize(
    "expression",
    [
        *("", "ALL", "some", "last", "last:", "last:0", "last:6", "first:0%", "first:101%", "last:-1", "last:1.5"),
        *("3:3", "4:2", "0:6", "-1:2", "1:", ":3", "1"),
        *([], [5], [-1], [0, True], [1.0], ["1"], 5, -1),
    ],
)
def test_what_selects_no_layers_of_the_model_is_refused(expression: Any) -> None:
    with pytest.raises(UsageError):
        parse_layers(expression, 5)


@given(MODEL_SIZES, st.data())
def test_ranges_select_what_slices_select(num_layers: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, num_layers - 1))
    end = data.draw(st.integers(start + 1, num_layers))
    everything = list(range(num_layers))
    assert parse_layers(f"{start}:{end}", num_layers) == everything[start:end]
    assert parse_layers(f"first:{end}", num_layers) == everything[:end]
    assert parse_layers(f"last:{end}", num_layers) == everything[-end:]


@given(MODEL_SIZES, st.integers(1, 100))
def test_percentages_are_near_and_never_empty(num_layers: int, percent: int) -> None:
    last = parse_layers(f"last:{percent}%", num_layers)
    assert last == list(range(num_layers))[-len(last) :]
    assert len(last) == len(parse_layers(f"first:{percent}%", num_layers)) >= 1
    assert abs(len(last) - num_layers * percent / 100) <= max(0.5, 1 - num_layers * percent / 100)


@given(st.integers(1, 30), st.lists(st.integers(-5, 35)))
def test_indices_are_sorted_unique_or_refused(num_layers: int, indices: list[int]) -> None:
    if indices and all(0 <= index < num_layers for index in indices):
        assert parse_layers(indices, num_layers) == sorted(set(indices))
    else:
        with pytest.raises(UsageError, match=rf"0 to {num_layers - 1}"):
            parse_layers(indices, num_layers)


@given(st.text(max_size=8), st.integers(1, 30))
def test_any_text_gives_layers_of_the_model_or_a_sentence(text: str, num_layers: int) -> None:
    try:
        layers = parse_layers(text, num_layers)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert layers
        assert set(layers) <= set(range(num_layers))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", ["shared and routed", "routed", "dense", "nothing"])
def test_advance_reads_and_sums_as_defined(name: str, parts: str) -> None:
    connectivity = Connectivity.named(name)
    before = Streams(torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    attended, shared, routed = (torch.randn(2, 3, 4) for _ in range(3))
    read = {}

    def attention(stream: torch.Tensor) -> torch.Tensor:
        read["attention"] = stream
        return attended

    def mlp(stream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        read["mlp"] = stream
        return (shared if "shared" in parts or parts == "dense" else None, routed if "routed" in parts else None)

    after = advance(before, connectivity, attention, mlp)
    assert torch.equal(read["attention"], before.partial if name in ("farskip", "attention_only") else before.full)
    assert torch.equal(read["mlp"], before.full if name in ("farskip", "moe_only") else before.full + attended)
    base = before.full + attended
    expected = {
        "shared and routed": Streams(base + (routed + shared), base + shared),
        "routed": Streams(base + routed, base),
        "dense": Streams(base + shared, base + shared),
        "nothing": Streams(base, base),
    }[parts]
    assert torch.equal(after.full, expected.full)
    assert torch.equal(after.partial, expected.partial)


@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_deeper_layers_read_routed_experts_of_earlier_layers_only(depth: int, with_shared: bool) -> None:
    embedding, *attended = torch.randn(7, 2, 3, dtype=torch.float64)
    shared, routed = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    streams = Streams.before_layers(embedding, depth)
    for k in range(6):
        own = sum(attended[:k]) + (sum(shared[:k]) if with_shared else 0)
        read = {}

        def attention(stream: torch.Tensor, k: int = k, read: dict = read) -> torch.Tensor:
            read["attention"] = stream
            return attended[k]

        def mlp(stream: torch.Tensor, k: int = k, read: dict = read) -> tuple[torch.Tensor | None, torch.Tensor]:
            read["mlp"] = stream
            return shared[k] if with_shared else None, routed[k]

        streams = advance(streams, Connectivity.farskip(depth), attention, mlp)
        for part, lacks in (("mlp", depth - 1), ("attention", depth)):
            torch.testing.assert_close(read[part], embedding + own + sum(routed[: max(0, k - lacks)]))
    everything = embedding + sum(attended) + (sum(shared) if with_shared else 0) + sum(routed)
    torch.testing.assert_close(streams.full, everything)
