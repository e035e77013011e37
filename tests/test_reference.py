"""The reference and the guides in docs/ are complete; `make docs` builds them."""

import inspect
import re
from pathlib import Path

import pytest

import farskip_fused as ff

DOCS = Path(__file__).parents[1] / "docs"
API = (DOCS / "api.md").read_text()
PUBLIC = [name for name in ff.__all__ if name != "__version__"]


def test_the_reference_has_every_public_name():
    assert not [name for name in PUBLIC if not re.search(rf"auto\w+:: farskip_fused\.{name}\n", API)]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_say_what_they_are(name):
    public = getattr(ff, name)
    described = [public]
    if inspect.isclass(public):
        members = [member for member in vars(public) if not member.startswith("_")]
        described += [each for each in (getattr(public, member) for member in members) if callable(each)]
    assert not [each for each in described if not each.__doc__]


def test_every_guide_is_in_the_contents():
    contents = set((DOCS / "index.md").read_text().split("\n"))
    assert not {page.stem for page in DOCS.glob("*.md")} - {"index"} - contents
