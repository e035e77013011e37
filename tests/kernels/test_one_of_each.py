"""What runs under compute-sanitizer launches every kernel that there is, but for NVSHMEM's."""

import farskip_fused as ff
from farskip_fused.kernels.launchable import Kernel
from tests.kernels import one_of_each
from tests.kernels.test_compiles import OTHERS, PLAIN_GEMMS


def test_every_kernel_is_launched(monkeypatch):
    monkeypatch.setattr(ff.FusedExperts, "is_alone", ff.FusedExperts.is_alone)  # which it overwrites
    launched = set()
    launch = Kernel.__getitem__
    monkeypatch.setattr(
        Kernel, "__getitem__", lambda kernel, grid: launched.add(kernel.function.fn.__name__) or launch(kernel, grid)
    )
    one_of_each.main()
    # Without a Hopper GPU nobody wants a sorted copy of the rows.
    assert (PLAIN_GEMMS | OTHERS) - launched <= {"_gather_rows"}
