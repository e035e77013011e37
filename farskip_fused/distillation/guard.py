"""Which steps are not taken: those that are not finite, and those whose gradient explodes."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

# Norms that the median is taken of, and how many there must be before it says something.
WINDOW, ENOUGH = 64, 16


@dataclass
class Guard:
    """Decides about each step from its loss and its gradient's norm before clipping.

    explosion: how many times the median of the last norms is too much. most_skipped: steps in a row that may be
    skipped. skipped: [step, loss, norm] of those that were.
    """

    explosion: float
    most_skipped: int
    norms: list[float] = field(default_factory=list)
    skipped: list[tuple[int, float, float]] = field(default_factory=list)
    in_a_row: int = 0

    def permits(self, step: int, loss: float, norm: float) -> bool:
        """Whether to take the step."""
        usual = statistics.median(self.norms) if len(self.norms) >= ENOUGH else math.inf
        if math.isfinite(loss) and math.isfinite(norm) and norm <= self.explosion * usual:
            self.norms = [*self.norms[1 - WINDOW :], norm]
            self.in_a_row = 0
            return True
        self.skipped.append((step, loss, norm))
        self.in_a_row += 1
        return False

    @property
    def diverged(self) -> bool:
        return self.in_a_row > self.most_skipped
