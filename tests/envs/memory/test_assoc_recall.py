"""The associative recall task against its rules."""

from __future__ import annotations

import pytest
import torch
from torchrl.envs.utils import check_env_specs

from cyborg_torchrl.envs import AssocRecallEnv, memoryless_policy, oracle_policy

NUM_ENVS = 32


@pytest.mark.parametrize(("pairs", "horizon"), [(1, 0), (3, 2)])
def test_specs_hold(pairs: int, horizon: int) -> None:
    check_env_specs(AssocRecallEnv(4, pairs=pairs, horizon=horizon, seed=0))


@pytest.mark.parametrize("horizon", [0, 4])
def test_an_episode_is_pairs_then_blanks_then_a_query(horizon: int) -> None:
    pairs, values = 3, 5
    env = AssocRecallEnv(NUM_ENVS, pairs=pairs, values=values, horizon=horizon, seed=0)
    rollout = env.rollout(pairs + horizon + 1, break_when_any_done=False)
    seen = rollout["observation"]
    key, value, flag = seen.split([pairs, values, 1], -1)
    assert (key[:, :pairs].sum(-1) == 1).all()
    assert (value[:, :pairs].sum(-1) == 1).all()
    assert (key[:, :pairs].sum(1) == 1).all(), "every key is shown once"
    assert (seen[:, pairs:-1] == 0).all()
    assert (key[:, -1].sum(-1) == 1).all()
    assert (value[:, -1] == 0).all()
    assert (flag[:, :-1] == 0).all()
    assert (flag[:, -1] == 1).all()
    asked = key[:, -1].argmax(-1)
    when = key[:, :pairs].argmax(1).gather(1, asked.unsqueeze(1)).squeeze(1)
    answer = value[torch.arange(NUM_ENVS), when].argmax(-1)
    is_right = rollout["action"][:, -1] == answer
    after = rollout["next"]
    assert torch.equal(after["success"][:, -1, 0], is_right.float())
    assert torch.equal(after["reward"][:, -1, 0], torch.where(is_right, 1.0, -1.0))
    assert (after["reward"][:, :-1] == 0).all()
    assert after["terminated"][:, -1].all()
    assert not after["done"][:, :-1].any()
    assert is_right.any()
    assert not is_right.all()


def test_order_values_and_question_vary() -> None:
    env = AssocRecallEnv(2000, pairs=4, values=4, horizon=0, seed=1)
    rollout = env.rollout(5, break_when_any_done=False)["observation"]
    for counts in (rollout[:, 0, :4].sum(0), rollout[:, 0, 4:8].sum(0), rollout[:, -1, :4].sum(0)):
        assert ((counts - 500).abs() < 5 * (2000 * 0.25 * 0.75) ** 0.5).all()


def success(env: AssocRecallEnv, policy) -> float:
    rollout = env.rollout(3 * env.max_episode_steps, policy, break_when_any_done=False)
    done = rollout["next", "done"]
    return rollout["next", "success"][done].float().mean().item()


@pytest.mark.parametrize("horizon", [0, 7])
def test_the_oracle_succeeds_and_the_memoryless_is_at_chance(horizon: int) -> None:
    env = AssocRecallEnv(500, pairs=4, values=4, horizon=horizon, seed=2)
    assert success(env, oracle_policy(env)) == 1.0
    assert abs(success(env, memoryless_policy(env)) - 0.25) < 0.06


def test_partial_reset_leaves_the_others_untouched() -> None:
    env = AssocRecallEnv(3, pairs=2, horizon=3, seed=3)
    td = env.reset()
    for _ in range(2):
        td = env.step(env.rand_action(td))["next"]
    before = env._latents["value_of"].clone(), env._time.clone()
    is_reset = torch.tensor([[False], [True], [False]])
    env.reset(td.exclude("reward").set("_reset", is_reset))
    assert torch.equal(env._latents["value_of"][[0, 2]], before[0][[0, 2]])
    assert env._time.tolist() == [2, 0, 2]


def test_a_seed_reproduces() -> None:
    first, second, other = (AssocRecallEnv(8, seed=seed).reset()["observation"] for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("option", "value"), [("pairs", 0), ("values", 1), ("horizon", -1), ("num_envs", 0)])
def test_bad_numbers_are_named(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{option} must be >= {value + 1}; got {value}"):
        AssocRecallEnv(**{"num_envs": 2, option: value})
