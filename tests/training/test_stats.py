"""Confidence intervals against other programs, hand-computed values and independent resamples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import modes
from cyborg_torchrl.training.stats import interquartile_mean, mean_interval, success_interval


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    # R, binom::binom.wilson and DescTools::BinomCI(method = "wilson")
    [(10, 10, 0.72246, 1.0), (0, 10, 0.0, 0.27754), (50, 100, 0.40383, 0.59617), (1, 4, 0.04559, 0.69936)],
)
def test_wilson(right: int, of: int, low: float, high: float) -> None:
    successes = torch.zeros(of, dtype=torch.float64)
    successes[:right] = 1.0
    assert success_interval(successes) == pytest.approx((low, high), abs=1e-5)


def test_student() -> None:
    values = torch.arange(1.0, 6.0, dtype=torch.float64)  # t(0.975, 4) = 2.776445, s = sqrt(2.5)
    assert mean_interval(values) == pytest.approx((3 - 1.963243, 3 + 1.963243), abs=1e-5)
    assert mean_interval(values[:1]) is None
    assert mean_interval(torch.ones(7)) == (1.0, 1.0)


def test_the_comparison_of_modes_is_as_wide_for_many_seeds() -> None:
    values = [0.0, 1.0] * 6  # t(0.975, 11) = 2.200985, s = sqrt(3 / 11)
    assert modes.interval(values) == pytest.approx((0.5, 2.200985 * (3 / 11 / 12) ** 0.5), abs=1e-5)
    assert modes.interval([0.7]) == (0.7, 0.0)
    assert np.isnan(modes.interval([])[0])


def test_shares_are_no_coin_flips() -> None:
    shares = torch.tensor([0.9, 1.0, 1.0, 1.0], dtype=torch.float64)
    interval = success_interval(shares)
    assert interval is not None
    assert interval.low == pytest.approx(float(shares.mean()) - 3.182446 * 0.05 / 2, abs=1e-5)  # t(0.975, 3), s = 0.05
    assert interval.high == 1.0


def test_a_quarter_is_left_out_at_either_end() -> None:
    five = np.array([[10.0], [0.2], [0.4], [0.6], [0.0]])
    assert interquartile_mean(five).point == pytest.approx(0.4)  # of 0.2, 0.4, 0.6
    eight = np.arange(8.0).reshape(4, 2) ** 2
    assert interquartile_mean(eight).point == pytest.approx((4 + 9 + 16 + 25) / 4)


@pytest.mark.parametrize("runs", [1, 2, 3, 7])
def test_interquartile_means_agree_with_rliable(runs: int) -> None:
    metrics = pytest.importorskip("rliable.metrics")
    scores = np.random.default_rng(0).random((runs, 3))
    assert interquartile_mean(scores).point == pytest.approx(metrics.aggregate_iqm(scores))


def test_runs_are_resampled_within_each_task() -> None:
    constant_tasks = np.tile([0.1, 0.9], (5, 1))
    assert interquartile_mean(constant_tasks) == pytest.approx((0.5, 0.5, 0.5))  # over all tasks it would be wide
    mixed = interquartile_mean(np.array([[0.1, 0.9], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.5, 0.5]]))
    assert mixed.high - mixed.low > 0.2


def test_intervals_are_percentiles_of_resamples() -> None:
    rng = np.random.default_rng(1)
    scores = rng.random((6, 2))
    resamples = np.array([
        np.sort(np.concatenate([rng.choice(scores[:, task], 6) for task in range(2)]))[3:-3].mean()
        for _ in range(20_000)
    ])  # fmt: skip
    estimate = interquartile_mean(scores)
    assert (estimate.low, estimate.high) == pytest.approx(np.percentile(resamples, [2.5, 97.5]), abs=0.03)


def test_intervals_repeat_and_leave_numpys_generator_alone() -> None:
    scores = np.random.default_rng(2).random((5, 1))
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert interquartile_mean(scores) == interquartile_mean(scores)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_one_run_has_no_interval() -> None:
    estimate = interquartile_mean(np.array([[0.7]]))
    assert estimate.point == 0.7
    assert np.isnan([estimate.low, estimate.high]).all()
    assert str(estimate) == "0.700"
    assert str(interquartile_mean(np.array([[0.5], [0.5]]))) == "0.500 [0.500, 0.500]"


def test_each_point_of_a_curve_has_its_own_mean() -> None:
    curves = np.array([[[seed / 10, 0.5, 1.0 - seed / 10]] for seed in range(5)])
    estimate = interquartile_mean(curves)
    assert estimate.point == pytest.approx([0.2, 0.5, 0.8])
    assert (estimate.low[1], estimate.high[1]) == pytest.approx((0.5, 0.5))
    first = interquartile_mean(curves[:, :, 0])
    assert (estimate.low[0], estimate.high[0]) == pytest.approx((first.low, first.high), abs=0.05)
