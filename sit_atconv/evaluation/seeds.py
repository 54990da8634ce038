"""Statistics over seeds: means and differences of runs that differ in their seeds alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from sit_atconv.evaluation.scores import Score, jackknife_error

CONFIDENCE = 0.95  # of the intervals


@dataclass(frozen=True)
class SeedScore(Score):
    """A score, or a difference of two, averaged over seeds.

    Args:
        error: standard error of the mean: the spread of the seeds, and the sampling error if all seeds share the noise.
        num_seeds: number of seeds.
        sampling_error: standard error of the mean for drawing other samples from the same weights; None if unknown.
        interval: bounds of the 95 % t interval.
    """

    num_seeds: int = 1
    sampling_error: float | None = None
    interval: tuple[float, float] = (-math.inf, math.inf)


def over_seeds(scores: Sequence[Score], shares_noise: bool = False) -> Score:
    """Returns the mean over seeds; a single score is returned unchanged.

    Args:
        scores: one score, or one difference of two scores, for each seed.
        shares_noise: True if the samples of all seeds were drawn from the same noise and labels. Then the spread of the
            seeds does not show the sampling error, and it is added.
    """
    if len(scores) == 1:
        return scores[0]
    values = [score.value for score in scores]
    sampling = _sampling_error(scores, shares_noise)
    parts = [(variance(values) / len(values), len(values) - 1)]
    if shares_noise and sampling:
        parts.append((sampling**2, max(1, len(scores[0].without_group) - 1)))
    return _with_interval(fmean(values), parts, len(values), sampling)


def difference_of_means(ours: Sequence[float], theirs: Sequence[float]) -> Score:
    """Returns the mean of `ours` minus that of `theirs`, for seeds that cannot be paired.

    The interval is Welch's (Biometrika 34, 1947). The error is None if one of them has a single value.
    """
    value = fmean(ours) - fmean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return Score(value)
    parts = [(variance(values) / len(values), len(values) - 1) for values in (ours, theirs)]
    return _with_interval(value, parts, min(len(ours), len(theirs)), None)


def _sampling_error(scores: Sequence[Score], shares_noise: bool) -> float | None:
    errors = [score.error for score in scores if score.error is not None]
    if len(errors) < len(scores):
        return None
    if not shares_noise:
        return math.hypot(*errors) / len(scores)
    groups = {len(score.without_group) for score in scores}
    if len(groups) == 1 and groups != {0}:  # group by group, the noise is the same
        return jackknife_error([fmean(each) for each in zip(*(s.without_group for s in scores), strict=True)])
    return fmean(errors)


def _with_interval(
    value: float, parts: Sequence[tuple[float, int]], num_seeds: int, sampling_error: float | None
) -> SeedScore:
    """Adds up the variances of independent errors, each with its degrees of freedom.

    Satterthwaite, Biometrics Bulletin 2, 1946.
    """
    from scipy.special import stdtrit  # late: commands that do not import torch start faster without it

    total = sum(part for part, _ in parts)
    freedom = total**2 / sum(part**2 / n for part, n in parts) if total else 1.0
    error = math.sqrt(total)
    reach = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    return SeedScore(
        value, error, num_seeds=num_seeds, sampling_error=sampling_error, interval=(value - reach, value + reach)
    )
