"""Scores: numbers with their standard errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """A number and its standard error.

    Args:
        value: the reported number.
        error: standard error for drawing other samples, with a fixed reference; None if unknown.
        without_group: values without group 0, 1, ... of the samples, from which the error is computed.
    """

    value: float
    error: float | None = None
    without_group: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.error or not math.isfinite(self.error):
            return f"{self.value:.4g}"
        decimals = max(0, 1 - math.floor(math.log10(self.error)))  # two digits of the error
        return f"{self.value:.{decimals}f} ± {self.error:.{decimals}f}"


def jackknife_error(without_group: Sequence[float]) -> float:
    """Returns the standard error by the delete-a-group jackknife (Shao and Tu 1995, 2.3)."""
    groups = len(without_group)
    mean = math.fsum(without_group) / groups
    return math.sqrt((groups - 1) / groups * math.fsum((value - mean) ** 2 for value in without_group))
