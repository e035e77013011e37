"""``farskip doctor``: what is installed, what does not fit together, and the command that mends it.

facts.py      looks; works without torch
verdict.py    judges what was seen; no look-ups of its own
rendering.py  prints
"""

from __future__ import annotations

from farskip_fused.doctor.facts import Facts, collect
from farskip_fused.doctor.verdict import Problem, Report, judge

__all__ = ["Facts", "Problem", "Report", "collect", "examine", "judge"]


def examine() -> Report:
    """Look at this environment and judge it."""
    facts = collect()
    return Report(facts, judge(facts))
