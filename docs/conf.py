"""What `make docs` builds: the guides, and the reference of the public API from its docstrings. Needs no network."""

from __future__ import annotations

import re
from importlib import metadata
from itertools import pairwise
from typing import Any

project = "farskip-fused"
release = metadata.version("farskip-fused")
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
default_role = "literal"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

# Of an argument or attribute, or several; and what a docstring ends with.
NAMED = re.compile(r"(\w+(?:, \w+)*|Parameters?|Attributes?)(?: \[[^]]*\])?: ?")


def as_restructured_text(lines: list[str]) -> list[str]:
    """Docstrings as they are written here: ``name: description`` at the margin, what belongs to it indented or below.

    Each becomes a paragraph of its own, and a block that is indented as a whole a literal one.
    """
    out: list[str] = []
    literal = in_item = False
    for before, line in pairwise(["", *lines]):
        if not before.strip():
            literal, in_item = line.startswith("    "), False
            if literal:
                out += ["::", ""]
        if literal or not line.strip():
            out.append(line)
            continue
        text, named, raises = line.strip().replace("|", "\\|"), NAMED.match(line), line.startswith("Raises ")
        ended = in_item and not line.startswith(" ") and before.endswith(".")
        if before.strip() and (named or raises or ended):
            out.append("")
        if named:
            text = f"**{named[1]}**{text[len(named[1]) :]}"
        in_item = named is not None or (in_item and not ended and not raises)
        out.append(text)
    return out


def rewrite(app: Any, what: str, name: str, about: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_restructured_text(lines)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", rewrite)
