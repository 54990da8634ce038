"""A score: a number with its standard error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """A number and its uncertainty.

    Args:
        value: what is reported.
        error: its standard error for the draw of the samples, the reference held fixed; None where there is none.
        without_group: the value without group 0, 1, ... of the samples, which the error comes from.
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
    """Returns the standard error from the values without one group each.

    The delete-a-group jackknife (Shao and Tu 1995, 2.3).
    """
    groups = len(without_group)
    mean = math.fsum(without_group) / groups
    return math.sqrt((groups - 1) / groups * math.fsum((value - mean) ** 2 for value in without_group))
