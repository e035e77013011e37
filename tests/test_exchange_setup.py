from types import SimpleNamespace

import pytest
import torch

import farskip_fused as ff
from farskip_fused import exchange_setup
from farskip_fused.schedule import COMMUNICATION


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    monkeypatch.setattr(exchange_setup, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))


@pytest.mark.parametrize(
    ("asked", "usual", "shares"),
    [
        (None, COMMUNICATION.share, (8, 124)),
        (None, COMMUNICATION.put_share, (16, 116)),
        (20, COMMUNICATION.put_share, (20, 112)),
    ],
)
def test_communication_has_a_share_of_the_multiprocessors_and_gemms_the_rest(asked, usual, shares):
    assert exchange_setup.share_multiprocessors(torch.device("cuda"), asked, usual) == shares


def test_a_share_that_leaves_nothing_is_refused():
    with pytest.raises(ff.UsageError, match="num_comm_sms is 132 and the GPU has 132"):
        exchange_setup.share_multiprocessors(torch.device("cuda"), 132)
