"""The faults of popgym that `fixed` mends."""

from __future__ import annotations

import pytest
import torch

from cyborg_torchrl.envs import build_popgym
from cyborg_torchrl.envs.popgym.base import PopgymEnv
from cyborg_torchrl.envs.popgym.build import FAMILIES


def both(family: str, num_envs: int = 8) -> tuple[PopgymEnv, PopgymEnv]:
    """Return the environment as in popgym, and mended, with the same seed."""
    kept, mended = (FAMILIES[family](num_envs, fixed=fixed, seed=0) for fixed in (False, True))
    return kept, mended


@pytest.mark.parametrize("family", ["PositionOnlyCartPole", "NoisyPositionOnlyCartPole", "VelocityOnlyCartpole"])
def test_a_fall_costs_one(family: str) -> None:
    kept, mended = both(family)
    for env, penalty in ((kept, 1 / 200), (mended, -1.0)):
        env.restart()
        has_fallen = torch.zeros(8, 1, dtype=torch.bool)
        for _ in range(30):
            result = env.advance(torch.ones(8, dtype=torch.long))
            is_over = result["terminated"]
            expected = torch.where(is_over, penalty, 1 / 200)
            torch.testing.assert_close(result["reward"], expected)
            has_fallen |= is_over
        assert has_fallen.all()


def test_the_first_velocities_are_shown() -> None:
    kept, mended = both("VelocityOnlyCartpole")
    state = mended._draw(8)["state"]
    assert torch.equal(mended._prepare({"state": state})["observation"], state[:, 1::2].float())
    assert torch.equal(kept._prepare({"state": state})["observation"], state[:, ::2].float())


@pytest.mark.parametrize("family", ["LabyrinthEscape", "LabyrinthExplore"])
def test_the_agent_is_in_the_middle_of_its_view(family: str) -> None:
    kept, mended = both(family)
    cells = torch.arange(121)
    assert torch.equal(mended._views[:, 4].cpu(), cells)
    is_inside = (cells // 11 > 0) & (cells % 11 > 0)
    assert torch.equal(kept._views[:, 4][is_inside], cells[is_inside])
    assert (kept._views[:, 4] != cells)[~is_inside].all()
    assert mended._views[0].tolist() == [121, 121, 121, 121, 0, 1, 121, 11, 12]
    assert kept._views[0].tolist() == [0, 1, 121, 11, 12, 121, 121, 121, 121]


def test_mazes_last_as_long_as_they_say() -> None:
    for env, steps in zip(both("LabyrinthExplore"), (1023, 1024), strict=True):
        env.restart()
        ends = [env.advance(torch.zeros(8, dtype=torch.long))["truncated"].all().item() for _ in range(steps)]
        assert ends == [False] * (steps - 1) + [True]
        assert env.max_episode_steps == 1024


def test_no_card_is_not_a_suit() -> None:
    kept, mended = both("Autoencode")
    deck = mended._draw(8)["deck"]
    shown, same = (env._prepare({"deck": deck})["observation.1"] for env in (mended, kept))
    assert torch.equal(shown[:, :52], same[:, :52])
    assert (shown[:, 52:] == 4).all()
    assert (same[:, 52:] == 0).all()
    assert mended.observation_spec["observation", "1"].n == 5
    mended.rollout(110)


def test_the_best_return_of_higher_lower_is_one() -> None:
    for env, best in zip(both("HigherLower"), (False, True), strict=True):
        stake = env._prepare(env._draw(8))["stake"].sum(1)
        assert torch.allclose(stake, torch.ones(8)) == best
        assert (stake <= 1 + 1e-5).all()


def test_the_option_reaches_the_environment_and_not_the_package() -> None:
    assert build_popgym(id="popgym-HigherLowerEasy-v0", num_envs=2, fixed=True).fixed
    with pytest.raises(ValueError, match=r"fixed mends native environments, but .* takes the package, since native is"):
        build_popgym(id="popgym-HigherLowerEasy-v0", num_envs=2, native=False, fixed=True)
