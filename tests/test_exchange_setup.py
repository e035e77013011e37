from types import SimpleNamespace

import pytest
import torch

import farskip_fused as ff
from farskip_fused import exchange_setup
from farskip_fused.symmetric.slots import SlotShape


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    monkeypatch.setattr(exchange_setup, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))


@pytest.mark.parametrize(
    ("by_put", "asked", "shares"), [(False, None, (8, 124)), (True, None, (16, 116)), (True, 20, (20, 112))]
)
def test_communication_has_a_share_of_the_multiprocessors_and_gemms_the_rest(by_put, asked, shares):
    shape = SlotShape(64, 256, 2, torch.bfloat16, 2, staged=by_put)
    slots = SimpleNamespace(memory=SimpleNamespace(device=torch.device("cuda"), world=2), shape=shape)
    exchange = exchange_setup._new_exchange(slots, 2, shape, 8, ff.ExchangeOptions(num_comm_sms=asked))
    assert (exchange.programs, exchange.gemm_programs) == shares


def test_a_share_that_leaves_nothing_is_refused():
    with pytest.raises(ff.UsageError, match="num_comm_sms is 132 and the GPU has 132"):
        exchange_setup.share_multiprocessors(torch.device("cuda"), 132)
