"""Interquartile means and their intervals, against hand-computed and independently drawn ones."""

from __future__ import annotations

import numpy as np
import pytest
from rliable import metrics

from cyborg_torchrl.memory_benchmarks.report.statistics import (
    POINTS,
    iqm_band,
    iqm_interval,
    steps_to,
)


def test_a_quarter_is_left_out_at_either_end() -> None:
    assert iqm_interval([[10.0], [0.2], [0.4], [0.6], [0.0]]).point == pytest.approx(0.4)  # of .2, .4, .6
    eight = np.arange(8.0).reshape(4, 2) ** 2
    assert iqm_interval(eight).point == pytest.approx((4 + 9 + 16 + 25) / 4)


@pytest.mark.parametrize("runs", [1, 2, 3, 7])
def test_it_is_rliables_own(runs: int) -> None:
    scores = np.random.default_rng(0).random((runs, 3))
    assert iqm_interval(scores).point == pytest.approx(metrics.aggregate_iqm(scores))


def test_seeds_are_drawn_again_within_each_task() -> None:
    constant_tasks = np.tile([0.1, 0.9], (5, 1))
    assert iqm_interval(constant_tasks) == pytest.approx((0.5, 0.5, 0.5))  # drawn over all tasks it would be wide
    mixed = iqm_interval(np.array([[0.1, 0.9], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.5, 0.5]]))
    assert mixed.high - mixed.low > 0.2


def test_intervals_are_percentiles_of_what_is_drawn_again() -> None:
    rng = np.random.default_rng(1)
    scores = rng.random((6, 2))
    drawn = np.array([
        np.sort(np.concatenate([rng.choice(scores[:, task], 6) for task in range(2)]))[3:-3].mean()
        for _ in range(20_000)
    ])  # fmt: skip
    interval = iqm_interval(scores)
    assert (interval.low, interval.high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.03)


def test_intervals_repeat_and_leave_numpys_generator_alone() -> None:
    scores = np.random.default_rng(2).random((5, 1))
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert iqm_interval(scores) == iqm_interval(scores)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_one_seed_has_no_interval() -> None:
    assert iqm_interval([[0.7]]) == (0.7, None, None)
    assert str(iqm_interval([[0.7]])) == "0.700"


def test_each_point_of_a_curve_is_a_mean_of_its_own() -> None:
    steps = np.array([10.0, 20.0, 30.0])
    values = [np.array([seed / 10, 0.5, 1.0 - seed / 10]) for seed in range(5)]
    band = iqm_band([(steps, value) for value in values])
    assert band.steps.tolist() == [10.0, 20.0, 30.0]
    assert band.point == pytest.approx([0.2, 0.5, 0.8])
    assert (band.low[1], band.high[1]) == pytest.approx((0.5, 0.5))
    first = iqm_interval([[value[0]] for value in values])
    assert (band.low[0], band.high[0]) == pytest.approx((first.low, first.high), abs=0.05)


def test_curves_are_compared_where_all_are() -> None:
    line = np.linspace(0.0, 1000.0, 201)
    band = iqm_band([(line, line * 2.0), (line[20:-20], line[20:-20] * 4.0)])
    assert (len(band.steps), band.steps[0], band.steps[-1]) == (POINTS, 100.0, 900.0)
    assert band.point == pytest.approx(band.steps * 3.0)
    apart = iqm_band([(line[:3], line[:3]), (line[10:], line[10:])])
    assert apart.steps.tolist() == [10.0]
    with pytest.raises(ValueError, match="must have a point"):
        iqm_band([(line[:0], line[:0])])


def test_steps_to_a_target_are_the_median_seeds() -> None:
    steps = np.array([1.0, 2.0, 3.0])
    fast, slow, never = (np.array(values) for values in ([0.9, 0.1, 1.0], [0.0, 0.5, 0.9], [0.0, 0.0, 0.0]))
    assert steps_to(0.9, [(steps, fast), (steps, slow), (steps, never)]) == 3.0
    assert steps_to(0.9, [(steps, fast), (steps, never), (steps, never)]) is None
    assert steps_to(0.9, []) is None
