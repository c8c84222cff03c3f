"""Time-scales, and the norm that gives their read-outs equal magnitude."""

from __future__ import annotations

import pytest
import torch

from cyborg_torchrl.cores import TimescaleNorm, log_spaced_timescales


def test_norm_by_hand() -> None:
    """Root mean squares: of (3, 4, 3, 4) sqrt(12.5); of (0.006, 0.008, ...) a 500th of it; of (0, 0, 0, 0) nothing."""
    norm = TimescaleNorm(12, groups=3)
    x = torch.tensor([[3.0, 4.0, 3.0, 4.0, 0.006, -0.008, 0.006, 0.008, 0.0, 0.0, 0.0, 0.0]])
    three, four = 3.0 / 12.5**0.5, 4.0 / 12.5**0.5
    expected = torch.tensor([[three, four, three, four, three, -four, three, four, 0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(norm(x), expected)


def test_every_group_has_the_same_magnitude_for_any_scale() -> None:
    norm = TimescaleNorm(32, groups=8)
    x = torch.randn(5, 7, 32) * torch.logspace(0, -3, 8).repeat_interleave(4)
    loudness = norm(x).unflatten(-1, (8, 4)).square().mean(-1)
    torch.testing.assert_close(loudness, torch.ones(5, 7, 8), rtol=0, atol=1e-2)
    one_group = TimescaleNorm(32, groups=1)(x).unflatten(-1, (8, 4)).square().mean(-1)
    assert (one_group[..., -1] < 1e-3).all(), "one norm over all channels drowns the slow ones"


def test_one_group_is_rms_norm() -> None:
    x = torch.randn(4, 10)
    torch.testing.assert_close(TimescaleNorm(10, groups=1)(x), torch.nn.functional.rms_norm(x, [10], eps=1e-12))


@pytest.mark.parametrize(
    ("features", "asked", "groups"),
    [(64, 16, 16), (8, 16, 2), (12, 16, 3), (10, 4, 2), (7, 16, 1), (2, 16, 1), (1, 16, 1), (27, 8, 3)],
)
def test_groups_divide_the_features_and_have_four_channels_or_more(features: int, asked: int, groups: int) -> None:
    norm = TimescaleNorm(features, asked)
    assert norm.groups == groups
    assert norm(torch.randn(3, features)).shape == (3, features)


def test_norm_gradcheck() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(TimescaleNorm(8, groups=2), (x,))


def test_groups_must_be_positive() -> None:
    with pytest.raises(ValueError, match="groups must be >= 1; got 0"):
        TimescaleNorm(8, groups=0)


def test_log_spaced_timescales() -> None:
    torch.testing.assert_close(log_spaced_timescales(5, 1000), torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4]))
    torch.testing.assert_close(log_spaced_timescales(3, 4, reach=1.0), torch.tensor([1.0, 2.0, 4.0]))
    assert log_spaced_timescales(1, 50).tolist() == [1.0]
    scales = log_spaced_timescales(64, 10_000)
    assert (scales[1:] > scales[:-1]).all()


@pytest.mark.parametrize(("channels", "horizon"), [(0, 10), (4, 0)])
def test_timescales_refuse_nothing(channels: int, horizon: int) -> None:
    with pytest.raises(ValueError, match=f"must be >= 1; got {channels} and {horizon}"):
        log_spaced_timescales(channels, horizon)


def test_a_memory_that_is_exactly_zero_gets_no_gradient() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0, 3.0, 4.0, 5.0, 6.0]], requires_grad=True)
    y = TimescaleNorm(8, 2)(x)
    y.sum().backward()
    assert (y[0, :4] == 0).all()
    assert x.grad is not None
    assert (x.grad[0, :4] == 0).all()
    assert x.grad[0, 4:].abs().min() > 0
