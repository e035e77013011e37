"""What runs under compute-sanitizer launches every kernel that there is, but for NVSHMEM's."""

import farskip_fused as ff
from tests.kernels import one_of_each
from tests.kernels.test_compiles import OTHERS, PLAIN_GEMMS


def test_every_kernel_is_launched(monkeypatch, launched):
    monkeypatch.setattr(ff.FusedExperts, "is_alone", ff.FusedExperts.is_alone)  # which it overwrites
    one_of_each.main()
    # Without a Hopper GPU nobody wants a sorted copy of the rows.
    assert (PLAIN_GEMMS | OTHERS) - set(launched) <= {"_gather_rows"}
