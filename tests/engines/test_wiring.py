"""The pair of tensors that engines hand from layer to layer carries FarSkip's two streams."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from farskip_fused.connectivity import NAMES, Connectivity, Streams, advance
from farskip_fused.engines.wiring import Wiring, read_wirings, wirings
from farskip_fused.errors import UsageError
from farskip_fused.record import to_record


class ToyLayer:
    """A random decoder layer; its attention and MLP are linear maps with a non-linearity."""

    def __init__(self, is_moe: bool) -> None:
        self.is_moe = is_moe
        self.matrices = torch.randn(3, 8, 8, dtype=torch.float64) / 3

    def attention(self, x: Tensor) -> Tensor:
        return (x @ self.matrices[0]).tanh()

    def mlp(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        shared, routed = (x @ self.matrices[1]).tanh(), (x @ self.matrices[2]).tanh()
        return (shared, routed) if self.is_moe else (shared, None)


def run_pair(layer: ToyLayer, wiring: Wiring, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """A layer as an engine runs it, by what ``Wiring`` says."""
    full = hidden + residual
    attended = layer.attention(residual if wiring.reads_partial else full)
    shared, routed = layer.mlp(full if wiring.mlp_first else full + attended)
    assert shared is not None
    if wiring.splits:
        assert routed is not None
        return routed, full + attended + shared
    return shared if routed is None else shared + routed, full + attended


@pytest.mark.parametrize("seed", range(8))
def test_pair_carries_both_streams(seed: int) -> None:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    is_moe = [choose.random() < 0.6 for _ in range(7)]
    connectivities = [Connectivity.named(choose.choice(NAMES)) for _ in is_moe]
    layers = [ToyLayer(moe) for moe in is_moe]
    embedding = torch.randn(5, 8, dtype=torch.float64)

    streams = Streams(embedding, embedding)
    hidden, residual = torch.zeros_like(embedding), embedding
    for layer, connectivity, wiring in zip(layers, connectivities, wirings(connectivities, is_moe), strict=True):
        streams = advance(streams, connectivity, layer.attention, layer.mlp)
        hidden, residual = run_pair(layer, wiring, hidden, residual)
        torch.testing.assert_close(hidden + residual, streams.full)


@pytest.mark.parametrize("is_moe", list(itertools.product([False, True], repeat=3)))
def test_standard_connectivity_is_the_stock_layer(is_moe: tuple[bool, ...]) -> None:
    assert all(wiring.is_stock for wiring in wirings([Connectivity.standard()] * 3, is_moe))


def test_record_of_a_checkpoint_is_read() -> None:
    record = to_record(Connectivity.farskip(), [1, 2])
    found = read_wirings(record, [False, True, True, True])
    assert [w.mlp_first for w in found] == [False, True, True, False]
    assert [w.reads_partial for w in found] == [False, False, True, False]
    assert [w.splits for w in found] == [False, True, False, False]
    with pytest.raises(UsageError, match="farskip"):
        read_wirings(None, [True])


def test_deeper_checkpoints_are_refused() -> None:
    with pytest.raises(UsageError, match="depth 2; serving engines run depth 1"):
        read_wirings(to_record(Connectivity.farskip(depth=2), [0]), [True])
