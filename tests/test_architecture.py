"""docs/architecture.md is drawn from the schedule, and names everything and nothing that is not there."""

import re
from pathlib import Path

import pytest

from farskip_fused.bench.architecture import CONNECTIVITY, FIGURE, MARKS, arrows, figure, rows, table
from farskip_fused.schedule import backward_order, forward_order

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
NAMES = set(re.findall(r"`((?:[\w.]+/)*[\w.]+/|(?:[\w.]+/)+[\w.]+|\w+\.py)`", PAGE.read_text()))
ROOMS = ("farskip_fused", "kernels", "csrc", "bench", "tests", "docs", "examples")


def test_the_page_and_its_figure_are_what_the_command_writes():
    assert f"{MARKS[0]}\n{table()}\n{MARKS[1]}" in PAGE.read_text()
    assert figure() == (PAGE.parent / FIGURE).read_text()


def test_an_arrow_leaves_where_a_transfer_is_launched_and_ends_where_it_is_awaited():
    drawn = arrows(rows(forward_order(CONNECTIVITY)), forward=True)
    assert drawn == [("combine", 4, 7), ("dispatch", 2, 4), ("dispatch", 8, 10)]
    drawn = arrows(rows(backward_order(CONNECTIVITY)), forward=False)
    assert drawn == [("combine_gradients", 5, 8), ("dispatch_gradients", 1, 4), ("dispatch_gradients", 8, 11)]


def test_everything_that_the_page_names_is_there():
    assert len(NAMES) > 80
    # The files of a package may be named without its folder.
    files = {path.name for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert not [name for name in NAMES if not (ROOT / name).exists() and name not in files]


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_on_the_page(room):
    packages = [path.parent for path in (ROOT / room).rglob("__init__.py")]  # without those that are links
    wanted = {f"{package.relative_to(ROOT)}/" for package in packages} | {f"{room}/"}
    if room in ("farskip_fused", "kernels", "csrc"):
        code = (".py", ".cpp", ".h", ".cu")
        wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / room).iterdir() if path.suffix in code}
    assert sorted(wanted - NAMES) == [], "name them in docs/architecture.md"
