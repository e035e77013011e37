"""Judge a log of compute-sanitizer's racecheck: `python tests/kernels/read_racecheck.py LOG`; exits with 1 on a race.

Triton compiles ``gl.warp_specialize`` to a byte of shared memory in which the first warps leave the others their part
between barriers of the block. Racecheck takes it for a race in a kernel that also has an mbarrier, down to one of two
empty partitions and one arrival (seen with Triton 3.6, CUDA 13.0), and names the kernel's ``def`` and the call for it.
Hazards there are counted apart; one at any other line is an error.
"""

import re
import sys
from collections import Counter
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"
ACCESS = re.compile(r"(?:Read|Write) access at \S+ in (\w+\.py):(\d+)")
DISPATCH = re.compile(r"\s*(def \w+_kernel\(|gl\.warp_specialize\()")


def judge(log: str) -> tuple[Counter[str], Counter[str]]:
    """Accesses that are reported, by file and line: those of Triton's dispatch of partitions, and all others."""
    dispatch: Counter[str] = Counter()
    races: Counter[str] = Counter()
    for name, line in ACCESS.findall(log):
        source = (KERNELS / name).read_text().splitlines()[int(line) - 1]
        (dispatch if DISPATCH.match(source) else races)[f"{name}:{line}"] += 1
    return dispatch, races


def main() -> None:
    log = Path(sys.argv[1]).read_text()
    if "RACECHECK SUMMARY" not in log:
        sys.exit("The log has no summary: racecheck did not end.")
    dispatch, races = judge(log)
    print(f"{dispatch.total()} accesses of Triton's dispatch of partitions, {races.total()} others in a hazard")
    for place, count in races.items():
        print(f"race at {place}, {count} times")
    sys.exit(1 if races else 0)


if __name__ == "__main__":
    main()
