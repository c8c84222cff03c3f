"""95 % confidence intervals: of means, of success rates, and of interquartile means over runs and tasks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Numbers = Array | np.float64
LEVEL = 0.95
RESAMPLES = 2000
# scipy.stats is imported in the functions, because its import takes a second


class Interval(NamedTuple):
    """Two numbers that enclose the true mean with a confidence of 95 %."""

    low: float
    high: float


class Estimate(NamedTuple):
    """Interquartile means with their 95 % intervals, one for each point [...]."""

    point: Numbers
    low: Numbers
    """NaN where there is only one run."""
    high: Numbers

    def __str__(self) -> str:
        return f"{self.point:.3f}" + ("" if np.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]")


def mean_interval(values: Tensor) -> Interval | None:
    """Return Student's interval of a mean; None for a single value.

    Args:
        values: one value per episode, or per run, [N].
    """
    from scipy import stats

    number = len(values)
    if number < 2:
        return None
    mean, spread = float(values.mean()), float(values.std())
    reach = float(stats.t.ppf((1.0 + LEVEL) / 2.0, number - 1)) * spread / number**0.5
    return Interval(mean - reach, mean + reach)


def success_interval(successes: Tensor) -> Interval | None:
    """Return Wilson's interval of a success rate.

    If an episode's success is a share of several answers, this is Student's interval, limited to [0, 1].

    Args:
        successes: one value per episode, [episodes], in [0, 1].

    Source: Wilson (1927). Unlike the normal interval, it has a width at rates of 0 and 1.
    """
    from scipy import stats

    is_binary = bool(((successes == 0) | (successes == 1)).all())
    if is_binary:
        limits = stats.binomtest(int(successes.sum()), len(successes)).proportion_ci(LEVEL, method="wilson")
        return Interval(float(limits.low), float(limits.high))
    limits = mean_interval(successes)
    return None if limits is None else Interval(max(0.0, limits.low), min(1.0, limits.high))


def interquartile_mean(scores: Array) -> Estimate:
    """Return the mean of the middle half of the scores, with a stratified bootstrap interval.

    The bootstrap resamples runs within each task. With few runs its intervals are too narrow.

    Args:
        scores: [runs, tasks] or, for several points at once, [runs, tasks, points].

    Source: Agarwal et al. (2021), "Deep reinforcement learning at the edge of the statistical precipice". Its
    package rliable computes the same means and draws the same kind of resamples.
    """
    from scipy import stats

    def middle(*tasks: Array, axis: int) -> Numbers:
        return stats.trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)

    tasks = tuple(np.moveaxis(scores, 1, 0))
    point = middle(*tasks, axis=0)
    if len(scores) < 2:
        return Estimate(point, np.full_like(point, np.nan), np.full_like(point, np.nan))
    generator = np.random.default_rng(0)  # the same scores have the same interval
    limits = stats.bootstrap(
        tasks, middle, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", random_state=generator
    ).confidence_interval
    return Estimate(point, limits.low, limits.high)
