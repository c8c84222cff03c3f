"""Episodes are counted once each, and intervals are those of the textbooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cyborg_torchrl.cores import build_gru
from cyborg_torchrl.training.evaluation import evaluate
from cyborg_torchrl.training.stats import mean_interval, success_interval


def test_every_environment_gives_its_first_episodes(make_env: Callable, make_agent: Callable) -> None:
    agent = make_agent(build_gru(3, hidden_size=8))
    env = make_env(5, 0)
    env.append_transform(agent.backbone.make_tensordict_primer())
    seen: list[tuple[int, int]] = []
    result = evaluate(agent, env, 12, on_episodes=lambda finished, total: seen.append((finished, total)))

    again = make_env(5, 0)
    again.append_transform(agent.backbone.make_tensordict_primer())
    tensordict = again.reset()
    sums, lengths, found = [0.0] * 5, [0] * 5, [[] for _ in range(5)]
    from torchrl.envs.utils import ExplorationType, set_exploration_type

    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        while min(map(len, found)) < 3:
            played, tensordict = again.step_and_maybe_reset(agent(tensordict))
            for i in range(5):
                sums[i] += float(played["next", "reward"][i])
                lengths[i] += 1
                if played["next", "done"][i]:
                    found[i].append((lengths[i], sums[i]))
                    sums[i], lengths[i] = 0.0, 0
    expected = sorted(pair for episodes in found for pair in episodes[:3])
    assert result.episodes == 15
    ours = sorted(zip(result.lengths.tolist(), result.returns.tolist(), strict=True))
    assert [length for length, _ in ours] == [length for length, _ in expected]
    assert [total for _, total in ours] == pytest.approx([total for _, total in expected], abs=1e-5)
    assert result.mean_reward == pytest.approx(sum(total for _, total in expected) / 15, abs=1e-5)
    assert result.success_rate is None
    assert seen[-1] == (15, 15)
    assert [finished for finished, _ in seen] == sorted(finished for finished, _ in seen)


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
    values = torch.arange(1.0, 6.0, dtype=torch.float64)  # t(.975, 4) = 2.776445, s = sqrt(2.5)
    assert mean_interval(values) == pytest.approx((3 - 1.963243, 3 + 1.963243), abs=1e-5)
    assert mean_interval(values[:1]) is None
    assert mean_interval(torch.ones(7)) == (1.0, 1.0)


def test_shares_are_no_coin_flips() -> None:
    shares = torch.tensor([0.9, 1.0, 1.0, 1.0], dtype=torch.float64)
    found = success_interval(shares)
    assert found is not None
    assert found.low == pytest.approx(float(shares.mean()) - 3.182446 * 0.05 / 2, abs=1e-5)  # t(.975, 3), s = .05
    assert found.high == 1.0
