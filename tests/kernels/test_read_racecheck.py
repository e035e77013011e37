"""What racecheck says of Triton's own dispatch is told from races of our kernels."""

from tests.kernels.read_racecheck import KERNELS, judge

REPORT = """========= Error: Race reported between Read access at project_kernel+0x120 in hopper_forward.py:{read}
=========     and Write access at project_kernel+0x5010 in hopper_forward.py:{write} [212 hazards]
"""


def line_of(text: str) -> int:
    lines = (KERNELS / "hopper_forward.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.strip().startswith(text))


def test_the_dispatch_of_partitions_is_no_race():
    log = REPORT.format(read=line_of("def project_kernel("), write=line_of("gl.warp_specialize("))
    dispatch, races = judge(log)
    assert dispatch.total() == 2 and not races


def test_a_hazard_at_any_other_line_is_a_race():
    line = line_of("stage_product(")
    _, races = judge(REPORT.format(read=line_of("def project_kernel("), write=line))
    assert races == {f"hopper_forward.py:{line}": 1}
