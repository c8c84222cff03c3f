"""Advantages and standardisation, against numbers written out by hand and against TorchRL."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives.value.functional import generalized_advantage_estimate

from cyborg_torchrl.cores import Core, MemorylessCore
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.objectives import (
    add_advantages,
    explained_variance,
    generalized_advantage,
    masked_standardize,
)

GAMMA, LAMBDA = 0.9, 0.8


def test_gae_by_hand() -> None:
    """gamma = lambda = 1/2, so gamma * lambda = 1/4.

    Row 0 terminates at step 1 (V(s_2) = 100 must not count) and is truncated at step 3 (V of its last observation: 6):
        delta = 1 + 2/2 - 1, 3 + 0 - 2, 3 + 8/2 - 4, 4 + 6/2 - 8 = 1, 1, 3, -1
        A     = 1 + 1/4, 1, 3 - 1/4, -1
    Row 1 is truncated at step 0 (V of its last observation: 4) and goes on at the end:
        delta = 1 + 4/2 - 2, 0 + 0 - 1 + 1, 0 + 4/2 - 0, 2 + 0 - 4 = 1, 0, 2, -2
        A     = 1, 0 + 1.5/4, 2 - 2/4, -2
    """
    advantage, target = generalized_advantage(
        reward_t=torch.tensor([[1.0, 3.0, 3.0, 4.0], [1.0, 1.0, 0.0, 2.0]]),
        value_t=torch.tensor([[1.0, 2.0, 4.0, 8.0], [2.0, 1.0, 0.0, 4.0]]),
        value_tp1=torch.tensor([[2.0, 100.0, 8.0, 6.0], [4.0, 0.0, 4.0, 0.0]]),
        is_terminated_t=torch.tensor([[False, True, False, False], [False] * 4]),
        is_done_t=torch.tensor([[False, True, False, True], [True, False, False, False]]),
        gamma=0.5,
        gae_lambda=0.5,
    )
    assert advantage.tolist() == [[1.25, 1.0, 2.75, -1.0], [1.0, 0.375, 1.5, -2.0]]
    assert target.tolist() == [[2.25, 3.0, 6.75, 7.0], [3.0, 1.375, 1.5, 2.0]]


@pytest.mark.parametrize("gae_lambda", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.875, 1.0])
def test_gae_equals_torchrl(gamma: float, gae_lambda: float) -> None:
    reward, value, value_tp1 = torch.randn(3, 5, 30, dtype=torch.float64).unbind(0)
    terminated, truncated = (torch.rand(2, 5, 30) < 0.15).unbind(0)
    done = terminated | truncated
    assert terminated.any()
    assert (truncated & ~terminated).any()
    advantage, target = generalized_advantage(reward, value, value_tp1, terminated, done, gamma, gae_lambda)
    wide = [x.unsqueeze(-1) for x in (value, value_tp1, reward, done, terminated)]
    expected, expected_target = generalized_advantage_estimate(gamma, gae_lambda, *wide)
    torch.testing.assert_close(advantage, expected.squeeze(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(target, expected_target.squeeze(-1), rtol=0, atol=1e-12)


def test_lambda_one_is_the_discounted_return() -> None:
    reward, value = torch.randn(2, 3, 6, dtype=torch.float64).unbind(0)
    done = torch.zeros(3, 6, dtype=torch.bool)
    done[:, -1] = True
    _, target = generalized_advantage(
        reward, value, torch.cat([value[:, 1:], torch.zeros(3, 1)], 1), done, done, 0.9, 1.0
    )
    returns = sum(0.9**t * reward[:, t] for t in range(6))
    torch.testing.assert_close(target[:, 0], returns, rtol=0, atol=1e-12)


def advantages_by_hand(agent: PPOAgent, rollout: TensorDictBase) -> tuple[Tensor, int]:
    """Steps through each environment alone, one step at a time. Returns advantages and how many were bootstrapped."""
    core, head = agent.backbone.core, agent.value_head.module
    advantages = torch.zeros(rollout.shape)
    bootstrapped = 0

    def value_of(observation: Tensor, state: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        features = agent.encoder.module(observation.unsqueeze(0))
        memory, state = core.step(features, state)
        return head(agent.fusion.module(features, memory)).item(), state

    for row in range(rollout.shape[0]):
        steps = rollout[row]
        state = {name: value[:1] for name, value in steps.get("memory_state", {}).items()}
        values, next_values = [], []
        for t in range(rollout.shape[1]):
            if steps["is_init"][t]:
                state = core.initial_state(1)
            value, state = value_of(steps["observation"][t], state)
            values.append(value)
            next_values.append(value_of(steps["next", "observation"][t], state)[0])  # state goes on, not this one
        running = 0.0
        for t in reversed(range(rollout.shape[1])):
            terminated, done = steps["next", "terminated"][t].item(), steps["next", "done"][t].item()
            bootstrapped += (done and not terminated) or (t == rollout.shape[1] - 1 and not terminated)
            delta = steps["next", "reward"][t].item() - values[t]
            delta += 0.0 if terminated else GAMMA * next_values[t]
            running = delta + (0.0 if done else GAMMA * LAMBDA * running)
            advantages[row, t] = running
    return advantages, bootstrapped


@torch.no_grad()
def test_advantages_equal_a_recomputation_step_by_step(
    build_core: Callable[..., Core], make_agent: Callable, make_env: Callable, collect: Callable
) -> None:
    agent = make_agent(build_core(5))
    rollout = collect(agent, make_env(2, p_terminated=0.2, p_truncated=0.2), 14)[:, 2:].contiguous()
    expected, bootstrapped = advantages_by_hand(agent, rollout)
    assert bootstrapped >= 3
    assert rollout["next", "terminated"].any()
    result = add_advantages(rollout, agent.get_value_operator(), gamma=GAMMA, gae_lambda=LAMBDA)
    assert result is rollout
    assert rollout["advantage"].shape == (*rollout.shape, 1)
    torch.testing.assert_close(rollout["advantage"].squeeze(-1), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(rollout["value_target"], rollout["advantage"] + rollout["state_value"])


@pytest.fixture
def agent_and_rollout(
    build_gru_case: Callable[..., Core], make_agent: Callable, make_env: Callable, collect: Callable
) -> tuple[PPOAgent, TensorDictBase]:
    agent = make_agent(build_gru_case(5))
    return agent, collect(agent, make_env(3), 24)[:, 4:].contiguous()


@torch.no_grad()
def test_the_reached_memory_matters_for_the_bootstrap(agent_and_rollout: tuple[PPOAgent, TensorDictBase]) -> None:
    agent, rollout = agent_and_rollout
    forgetful = rollout.clone()
    forgetful["next", "memory_state"].zero_()
    for td in (rollout, forgetful):
        add_advantages(td, agent.get_value_operator(), gamma=GAMMA, gae_lambda=LAMBDA)
    is_cut = (rollout["next", "done"] & ~rollout["next", "terminated"]).squeeze(-1)
    is_cut[:, -1] = ~rollout["next", "terminated"][:, -1, 0]
    difference = (rollout["advantage"] - forgetful["advantage"]).abs().squeeze(-1)
    assert (difference[is_cut] > 1e-3).all()


@torch.no_grad()
def test_advantages_of_an_environment_do_not_depend_on_the_others(
    agent_and_rollout: tuple[PPOAgent, TensorDictBase],
) -> None:
    agent, rollout = agent_and_rollout
    alone = torch.cat(
        [
            add_advantages(rollout[i : i + 1].clone(), agent.get_value_operator(), gamma=GAMMA, gae_lambda=LAMBDA)
            for i in range(rollout.shape[0])
        ]
    )
    add_advantages(rollout, agent.get_value_operator(), gamma=GAMMA, gae_lambda=LAMBDA)
    torch.testing.assert_close(alone["advantage"], rollout["advantage"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_values_that_were_not_recorded_are_computed(agent_and_rollout: tuple[PPOAgent, TensorDictBase]) -> None:
    agent, rollout = agent_and_rollout
    bare = rollout.exclude("state_value", ("next", "state_value"))
    for td in (rollout, bare):
        add_advantages(td, agent.get_value_operator(), gamma=GAMMA, gae_lambda=LAMBDA)
    torch.testing.assert_close(bare["state_value"], rollout["state_value"], rtol=0, atol=1e-5)
    torch.testing.assert_close(bare["advantage"], rollout["advantage"], rtol=0, atol=1e-4)


@torch.no_grad()
def test_advantages_without_memory(
    build_gru_case: Callable[..., Core], make_agent: Callable, make_env: Callable, collect: Callable
) -> None:
    agent = make_agent(MemorylessCore(build_gru_case(5)))
    rollout = collect(agent, make_env(3), 20)
    expected, _ = advantages_by_hand(agent, rollout)
    add_advantages(rollout, agent.get_value_operator(), gamma=GAMMA, gae_lambda=LAMBDA)
    torch.testing.assert_close(rollout["advantage"].squeeze(-1), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_rollout_is_envs_by_time(
    build_gru_case: Callable[..., Core], make_agent: Callable, make_env: Callable, collect: Callable
) -> None:
    agent = make_agent(build_gru_case(5))
    rollout = collect(agent, make_env(3), 4)
    with pytest.raises(ValueError, match=r"\[N, T\]; got \[12\]"):
        add_advantages(rollout.reshape(-1), agent.get_value_operator(), gamma=GAMMA, gae_lambda=LAMBDA)


def test_masked_standardize() -> None:
    # kept: 1, 3, 5 with mean 3 and standard deviation 2
    x = torch.tensor([[1.0, 100.0], [3.0, 5.0]])
    mask = torch.tensor([[True, False], [True, True]])
    assert masked_standardize(x, mask).tolist() == [[-1.0, 48.5], [0.0, 1.0]]
    torch.testing.assert_close(masked_standardize(x), (x - x.mean()) / x.std())
    assert masked_standardize(torch.full((3,), 7.0)).tolist() == [0.0, 0.0, 0.0]
    assert masked_standardize(torch.tensor([4.0])).tolist() == [4.0]
    assert masked_standardize(x, torch.zeros_like(mask)).isfinite().all()


def test_explained_variance() -> None:
    target = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(target, target) == 1.0
    torch.testing.assert_close(explained_variance(torch.full((4,), 9.0), target), torch.tensor(0.0))
    # residuals -1, 0, 0, 1 have variance 2/3, targets 5/3
    torch.testing.assert_close(explained_variance(torch.tensor([2.0, 2.0, 3.0, 3.0]), target), torch.tensor(0.6))
    assert explained_variance(torch.zeros(3), torch.zeros(3)).isfinite()
