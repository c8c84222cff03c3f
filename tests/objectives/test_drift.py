"""Drift of stored states: against a replay of the rollout, step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from cyborg_torchrl.collectors import RolloutCollector
from cyborg_torchrl.config import TrainConfig
from cyborg_torchrl.cores import Core
from cyborg_torchrl.data import EpisodeBuffer, RecurrentRolloutBuffer, Rollout
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.objectives import RecurrentClipPPOLoss, add_advantages, measure_drift
from cyborg_torchrl.training.trainer import PPOTrainer

NUM_ENVS, STEPS, SEQ_LEN = 3, 12, 4


@pytest.fixture
def agent(build_gru_case: Callable[..., Core], make_agent: Callable) -> PPOAgent:
    return make_agent(build_gru_case(5))


@pytest.fixture
def rollout(agent: PPOAgent, make_env: Callable, collect: Callable):
    steps = collect(agent, make_env(NUM_ENVS, p_terminated=0.03, p_truncated=0.03), STEPS + 5)[:, 5:].contiguous()
    return add_advantages(steps, agent.get_value_operator(), gamma=0.99, gae_lambda=0.95)


def drift_of(agent: PPOAgent, rollout, burn_in: int) -> dict[str, float]:
    buffer = RecurrentRolloutBuffer(rollout.numel(), SEQ_LEN, 4, num_envs=NUM_ENVS, burn_in=burn_in)
    buffer.store(rollout.clone())
    start = rollout.select("memory_state")[:, 0]
    steps = rollout.exclude("memory_state", "next")
    used = buffer.chunks(torch.tensor([1, 2]), NUM_ENVS)
    figures = measure_drift(RecurrentClipPPOLoss(agent), steps, start, used, [SEQ_LEN, 2 * SEQ_LEN])
    return {name: float(value) for name, value in figures.items()}


def shake(agent: PPOAgent) -> None:
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


@torch.no_grad()
def by_hand(agent: PPOAgent, rollout, burn_in: int) -> dict[str, float]:
    """Each environment and chunk by itself: the core stepped from the first state, and from the stored one."""
    core, kinds = agent.backbone.core, {"state": [], "first": [], "last": []}
    features = agent.encoder.module(rollout["observation"])

    def run(env: int, begin: int, end: int) -> tuple[list[Categorical], dict]:
        state = {name: rollout[key][env : env + 1, begin] for name, key in agent.backbone.state_keys.items()}
        dists, at_chunk = [], None
        for t in range(begin, end):
            if rollout["is_init"][env, t]:
                state = core.initial_state(1)
            if t == end - SEQ_LEN:
                at_chunk = {name: value.clone() for name, value in state.items()}
            x = features[env : env + 1, t]
            y, state = core.step(x, state)
            dists.append(Categorical(logits=agent.policy_head.module(agent.fusion.module(x, y))))
        return dists, at_chunk

    for first in (SEQ_LEN, 2 * SEQ_LEN):
        for env in range(NUM_ENVS):
            fresh, fresh_state = run(env, 0, first + SEQ_LEN)
            used, used_state = run(env, first - burn_in, first + SEQ_LEN)
            for name, place in (("first", -SEQ_LEN), ("last", -1)):
                kinds[name].append(float(kl_divergence(fresh[place], used[place])))
            if not rollout["is_init"][env, first]:
                change = sum((used_state[k] - fresh_state[k]).square().sum() for k in fresh_state).sqrt()
                kinds["state"].append(float(change / sum(v.square().sum() for v in fresh_state.values()).sqrt()))
            else:
                kinds["state"].append(0.0)
    return {name: sum(values) / len(values) for name, values in kinds.items()}


@pytest.mark.parametrize("burn_in", [0, 3])
def test_drift_is_that_of_a_replay(agent: PPOAgent, rollout, burn_in: int) -> None:
    shake(agent)
    got, expected = drift_of(agent, rollout, burn_in), by_hand(agent, rollout, burn_in)
    assert expected["state"] > 0.01
    assert got["state_drift"] == pytest.approx(expected["state"], rel=1e-3)
    assert got["drift_kl_first"] == pytest.approx(expected["first"], rel=1e-3, abs=1e-6)
    assert got["drift_kl_last"] == pytest.approx(expected["last"], rel=1e-3, abs=1e-6)


def test_what_acted_has_not_drifted_and_burn_in_helps(agent: PPOAgent, rollout) -> None:
    assert drift_of(agent, rollout, 0)["state_drift"] <= 1e-5
    shake(agent)
    assert drift_of(agent, rollout, 4)["state_drift"] < drift_of(agent, rollout, 0)["state_drift"]


def trainer_of(agent: PPOAgent, buffer, **options) -> PPOTrainer:
    config = TrainConfig(n_epochs=3, total_timesteps=buffer.num_steps, learning_rate=0.05, **options)
    return PPOTrainer([], RecurrentClipPPOLoss(agent), agent.get_value_operator(), buffer, config)


def test_refreshed_states_are_those_of_the_present_parameters(agent: PPOAgent, rollout) -> None:
    buffer = RecurrentRolloutBuffer(rollout.numel(), SEQ_LEN, 4, num_envs=NUM_ENVS)
    trainer = trainer_of(agent, buffer)
    kept = Rollout.from_steps(rollout.clone(), trainer.loss.state_keys, buffer.state_steps(STEPS))
    buffer.store(kept)
    shake(agent)
    trainer._refresh(kept)
    core, features = agent.backbone.core, agent.encoder.module(rollout["observation"])
    for env in range(NUM_ENVS):
        state = {name: rollout[key][env : env + 1, 0] for name, key in agent.backbone.state_keys.items()}
        for t in range(STEPS):
            if t % SEQ_LEN == 0:
                stored = buffer.chunks(torch.tensor([t // SEQ_LEN]), NUM_ENVS)["memory_state", "hidden"][env, 0]
                torch.testing.assert_close(stored, state["hidden"][0], rtol=1e-4, atol=1e-5)
            if rollout["is_init"][env, t]:
                state = core.initial_state(1)
            with torch.no_grad():
                _, state = core.step(features[env : env + 1, t], state)


@pytest.mark.parametrize("refresh", [False, True])
def test_every_log_has_the_drift(agent: PPOAgent, rollout, refresh: bool) -> None:
    buffer = RecurrentRolloutBuffer(rollout.numel(), SEQ_LEN, 4, num_envs=NUM_ENVS)
    metrics = trainer_of(agent, buffer, refresh_states=refresh).update(rollout.clone())
    assert metrics["ratio_error"] <= 1e-5
    assert metrics["state_drift"] > 1e-3
    assert metrics["drift_kl_last"] >= 0


def test_whole_episodes_do_not_drift(agent: PPOAgent, rollout) -> None:
    buffer = EpisodeBuffer(rollout.numel(), STEPS, 2, num_envs=NUM_ENVS)
    assert trainer_of(agent, buffer).update(rollout.clone())["state_drift"] == 0.0


def test_refreshing_with_what_acted_changes_nothing(make_env: Callable, their_policy: Callable) -> None:
    """For TorchRL's modules too, which go on from whatever stands at a reset."""
    policy = their_policy("gru")
    frames = NUM_ENVS * STEPS
    buffer = RecurrentRolloutBuffer(frames, SEQ_LEN, 4, num_envs=NUM_ENVS, state_keys=policy.state_keys)
    collector = RolloutCollector(
        make_env(NUM_ENVS, p_terminated=0.2), policy.actor, frames_per_batch=frames, total_frames=3 * frames,
        value_operator=policy.critic, state_steps=buffer.state_steps,
    )  # fmt: skip
    loss = RecurrentClipPPOLoss(policy.actor, policy.head)
    trainer = PPOTrainer([], loss, policy.critic, buffer, TrainConfig())
    for kept in collector:
        add_advantages(kept.steps, policy.critic, gamma=0.99, gae_lambda=0.95)
        buffer.store(kept)
        trainer._refresh(kept)
        for batch in buffer:
            with torch.no_grad():
                assert loss(batch)["ratio_error"] <= 1e-5
        assert trainer._drift(kept)["state_drift"] <= 1e-4
