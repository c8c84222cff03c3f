"""Confidence intervals of what was measured on episodes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

LEVEL = 0.95


class Interval(NamedTuple):
    """Between which numbers the true mean lies, with a confidence of 95 %."""

    low: float
    high: float


def mean_interval(values: Tensor) -> Interval | None:
    """Student's interval of a mean; None for a single value.

    Args:
        values: one of each episode, [episodes].
    """
    from scipy import stats  # its import takes a second

    number = len(values)
    if number < 2:
        return None
    mean, spread = float(values.mean()), float(values.std())
    reach = float(stats.t.ppf((1.0 + LEVEL) / 2.0, number - 1)) * spread / number**0.5
    return Interval(mean - reach, mean + reach)


def success_interval(successes: Tensor) -> Interval | None:
    """Wilson's interval of a success rate, of episodes that succeed or not.

    Where an episode's success is a share, of several answers, Student's, cut to [0, 1].

    Args:
        successes: one of each episode, [episodes], in [0, 1].

    Source: Wilson (1927); unlike the normal interval it has a width at rates of 0 and 1.
    """
    from scipy import stats

    is_binary = bool(((successes == 0) | (successes == 1)).all())
    if is_binary:
        found = stats.binomtest(int(successes.sum()), len(successes)).proportion_ci(LEVEL, method="wilson")
        return Interval(float(found.low), float(found.high))
    found = mean_interval(successes)
    return None if found is None else Interval(max(0.0, found.low), min(1.0, found.high))
