"""Interquartile means with 95 % stratified bootstrap intervals, by rliable; curves on one grid; steps to a target.

Source: Agarwal et al. (2021), "Deep reinforcement learning at the edge of the statistical precipice".
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rliable import library

Array = NDArray[np.float64]
REPETITIONS = 2000
POINTS = 80
"""Points of a curve at most."""


class Interval(NamedTuple):
    """An estimate, with its 95 % interval where there is more than one seed."""

    point: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.point:.3f}" + ("" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]")


class Band(NamedTuple):
    """A curve of estimates with their intervals."""

    steps: Array
    """[P]."""
    point: Array
    """[P]."""
    low: Array
    """[P]; the same as `point` where there is one seed."""
    high: Array
    num_seeds: int


def iqm_interval(scores: Array | Sequence[Sequence[float]]) -> Interval:
    """The interquartile mean of scores [runs, tasks]; runs are drawn again within each task."""
    scores = np.asarray(scores, dtype=np.float64)
    point, limits = _estimate(scores[:, :, np.newaxis])
    if limits is None:
        return Interval(float(point[0]), None, None)
    return Interval(float(point[0]), float(limits[0, 0]), float(limits[1, 0]))


def iqm_band(curves: Sequence[tuple[Array, Array]]) -> Band:
    """The interquartile mean of curves (steps, values), one a seed, over the steps that all of them cover.

    Between points of a curve its value is interpolated.

    Raises:
        ValueError: if there is no curve, or one without a point.
    """
    if not curves or any(len(steps) == 0 for steps, _ in curves):
        raise ValueError("every curve must have a point.")
    steps = _grid([steps for steps, _ in curves])
    values = np.stack([np.interp(steps, *curve) for curve in curves])
    point, limits = _estimate(values[:, np.newaxis])
    low, high = (point, point) if limits is None else limits
    return Band(steps, point, low, high, len(values))


def steps_to(target: float, curves: Sequence[tuple[Array, Array]]) -> float | None:
    """Environment steps after which training first reached the target: the median seed's; None if most never did."""
    reached = [float(steps[values >= target][0]) if (values >= target).any() else np.inf for steps, values in curves]
    return None if not reached or np.isinf(median(reached)) else float(median(reached))


def _grid(steps: Sequence[Array]) -> Array:
    """Steps at which curves are compared: their own where all have the same few."""
    if all(len(other) == len(steps[0]) <= POINTS and bool((other == steps[0]).all()) for other in steps):
        return steps[0]
    first, last = max(other[0] for other in steps), min(other[-1] for other in steps)
    return np.linspace(first, last, POINTS) if first < last else np.array([last])


def _estimate(scores: Array) -> tuple[Array, Array | None]:
    """Interquartile means [P] of scores [runs, tasks, P] and the limits [2, P] of their intervals; None for one run.

    A quarter of the scores of all runs and tasks is left out at either end, as rliable's `aggregate_iqm` does, which
    takes one point at a time.
    """
    runs, tasks, points = scores.shape
    kept = slice(runs * tasks // 4, runs * tasks - runs * tasks // 4)
    middle: Callable[[Array], Array] = lambda drawn: np.sort(drawn.reshape(-1, points), axis=0)[kept].mean(0)  # noqa: E731
    if runs < 2:
        return middle(scores), None
    table: Mapping[str, Any] = {"": scores}
    with _seeded():
        found, limits = library.get_interval_estimates(table, middle, reps=REPETITIONS)
    return found[""], limits[""]


@contextmanager
def _seeded() -> Generator[None]:
    """Numpy's global generator, which rliable draws from, seeded here and left as it was."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
