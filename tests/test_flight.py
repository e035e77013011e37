from types import SimpleNamespace

import pytest
import torch

from farskip_fused.flight import Exchange, Flight
from farskip_fused.kernels import protocol


@pytest.mark.parametrize(
    ("staged", "whole", "is_newest", "begins"),
    [
        pytest.param(False, False, True, "as rows come, beside communication", id="stores"),
        pytest.param(False, True, True, "with all rows, alone", id="fp8"),
        pytest.param(True, False, True, "with all rows, alone", id="puts"),
        pytest.param(True, False, False, "with all rows, beside communication", id="puts, a later round under way"),
    ],
)
def test_a_gemm_begins_when_its_rows_can_be_told_and_takes_what_nothing_travels_on(
    monkeypatch, staged, whole, is_newest, begins
):
    steps = []
    monkeypatch.setattr(protocol, "wait_arrival", lambda *wait: steps.append("waited"))
    slots = SimpleNamespace(is_newest=lambda ticket: is_newest)
    exchange = Exchange(slots, 4, 2, 16, 64, programs=8, gemm_programs=124, staged=staged)
    flight = Flight(exchange, torch.zeros(4, 2, dtype=torch.int32))
    flight.gradient_ticket = None
    monkeypatch.setattr(flight, "landed", lambda: steps.append("landed"))
    slot, programs = flight.rows(SimpleNamespace(), whole)
    assert slot.arrived == begins.startswith("with all rows")
    assert steps == (["landed", "waited"] if slot.arrived else [])
    assert programs == (132 if begins.endswith("alone") else 124)
