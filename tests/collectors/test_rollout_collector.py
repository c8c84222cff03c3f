"""Rollouts without a state for every step: beside TorchRL's own collector."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from weakref import ref

import gymnasium
import pytest
import torch
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, GymEnv, GymWrapper, ParallelEnv, SerialEnv

from cyborg_torchrl.collectors import RolloutCollector
from cyborg_torchrl.config import load_config
from cyborg_torchrl.cores import Core, build_gru
from cyborg_torchrl.data import RecurrentRolloutBuffer, Rollout
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.objectives import RecurrentClipPPOLoss, add_advantages
from cyborg_torchrl.training.builders import build_trainer

NUM_ENVS, STEPS = 4, 12
FRAMES = NUM_ENVS * STEPS


@pytest.fixture
def agent(build_gru_case: Callable[..., Core], make_agent: Callable) -> PPOAgent:
    return make_agent(build_gru_case(5))


def collect_ours(agent: PPOAgent, env, at: list[int], updates: int = 2) -> list[Rollout]:
    collector = RolloutCollector(
        env, agent, frames_per_batch=FRAMES, total_frames=updates * FRAMES,
        value_operator=agent.get_value_operator(), state_steps=lambda steps: at,
    )  # fmt: skip
    collector.set_seed(5)
    torch.manual_seed(1)
    rollouts = list(collector)
    collector.shutdown()
    return rollouts


def collect_theirs(agent: PPOAgent, env, updates: int = 2) -> list[TensorDictBase]:
    collector = Collector(
        env, agent, frames_per_batch=FRAMES, total_frames=updates * FRAMES, auto_register_policy_transforms=True
    )
    collector.set_seed(5)
    torch.manual_seed(1)
    rollouts = [rollout.clone() for rollout in collector]
    collector.shutdown()
    return rollouts


def test_steps_and_states_are_those_of_torchrls_collector(agent: PPOAgent, make_env: Callable) -> None:
    at = [0, 5, 11]
    ours, theirs = collect_ours(agent, make_env(NUM_ENVS), at), collect_theirs(agent, make_env(NUM_ENVS))
    for rollout, expected in zip(ours, theirs, strict=True):
        steps = rollout.steps
        assert steps.shape == (NUM_ENVS, STEPS)
        for key in ("observation", "action", "action_log_prob", "state_value", "is_init", ("next", "reward"),
                    ("next", "done"), ("next", "terminated"), ("next", "observation")):  # fmt: skip
            assert torch.equal(steps[key], expected[key]), key
        assert "memory_state" not in steps.keys()
        assert "memory_state" not in steps["next"].keys()
        hidden = rollout.stored_states["memory_state", "hidden"]
        is_init = expected["is_init"][:, at].squeeze(-1)
        assert torch.equal(hidden[~is_init], expected["memory_state", "hidden"][:, at][~is_init])


def test_advantages_are_those_of_stored_states(agent: PPOAgent, make_env: Callable) -> None:
    """The values of observations that nothing follows are taken while their states are there."""
    ours, theirs = collect_ours(agent, make_env(NUM_ENVS), [0]), collect_theirs(agent, make_env(NUM_ENVS))
    is_cut = theirs[0]["next", "truncated"][:, :-1] & ~theirs[0]["next", "terminated"][:, :-1]
    assert is_cut.any(), "an episode must be cut off inside"
    for rollout, expected in zip(ours, theirs, strict=True):
        for steps in (rollout.steps, expected):
            add_advantages(steps, agent.get_value_operator(), gamma=0.99, gae_lambda=0.95)
        torch.testing.assert_close(rollout.steps["advantage"], expected["advantage"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("seq_len", [3, 5])
def test_what_is_kept_is_what_the_buffer_needs(agent: PPOAgent, make_env: Callable, seq_len: int) -> None:
    buffer = RecurrentRolloutBuffer(FRAMES, seq_len, 4, num_envs=NUM_ENVS, burn_in=2)
    at = buffer.state_steps(STEPS)
    for rollout in collect_ours(agent, make_env(NUM_ENVS), at):
        add_advantages(rollout.steps, agent.get_value_operator(), gamma=0.99, gae_lambda=0.95)
        buffer.store(rollout)
        loss = RecurrentClipPPOLoss(agent)
        for batch in buffer:
            with torch.no_grad():
                assert loss(batch)["ratio_error"] <= 1e-5


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_policy_of_torchrls_own_modules(make_env: Callable, their_policy: Callable, kind: str) -> None:
    """Found by the names of its states; burn-in and stored_states work with it too."""
    policy = their_policy(kind)
    options = {"state_keys": policy.state_keys, "num_envs": NUM_ENVS}
    cuts = [{"seq_len": 5}, {"seq_len": 4, "burn_in": 3}, {"seq_len": 3, "state_stride": 6}]
    for cut in cuts:
        buffer = RecurrentRolloutBuffer(FRAMES, batch_size=4, **cut, **options)
        collector = RolloutCollector(
            make_env(NUM_ENVS), policy.actor, frames_per_batch=FRAMES, total_frames=2 * FRAMES,
            value_operator=policy.critic, state_steps=buffer.state_steps,
        )  # fmt: skip
        loss = RecurrentClipPPOLoss(policy.actor, policy.head)
        for rollout in collector:
            assert policy.state_keys[0] not in rollout.steps.keys()
            buffer.store(add(rollout, policy.critic), policy.actor)
            for batch in buffer:
                with torch.no_grad():
                    assert loss(batch)["ratio_error"] <= 1e-5, cut


def add(rollout: Rollout, critic) -> Rollout:
    add_advantages(rollout.steps, critic, gamma=0.99, gae_lambda=0.95)
    return rollout


def cart_pole(**options: int) -> EnvBase:
    return GymEnv("CartPole-v1", **options)


def cart_pole_vector(mode: str) -> EnvBase:
    options = {"autoreset_mode": gymnasium.vector.AutoresetMode[mode]}
    return GymWrapper(
        gymnasium.make_vec("CartPole-v1", NUM_ENVS, vectorization_mode="sync", vector_kwargs=options),
    )


GYM_ENVS = {
    "gym": cart_pole,
    "gym_vector": lambda: cart_pole_vector("DISABLED"),
    "gym_vector_same_step": lambda: cart_pole_vector("SAME_STEP"),
    "serial": lambda: SerialEnv(NUM_ENVS, cart_pole),
    # what travels to other processes is importable there; this module need not be
    "parallel": lambda: ParallelEnv(2, partial(GymEnv, "CartPole-v1")),
}


@pytest.mark.parametrize("kind", GYM_ENVS)
def test_environments_of_gymnasium(kind: str) -> None:
    env = GYM_ENVS[kind]()
    batch_dims = len(env.batch_size)
    encoder = build_encoder(env.observation_spec, batch_dims=batch_dims, features=8)
    agent = PPOAgent(encoder, Backbone(build_gru(8, hidden_size=8)), env.action_spec, batch_dims=batch_dims)
    num_envs = env.batch_size.numel()
    frames = num_envs * 30
    buffer = RecurrentRolloutBuffer(frames, 7, 4, num_envs=num_envs, burn_in=3)
    collector = RolloutCollector(
        env, agent, frames_per_batch=frames, total_frames=2 * frames,
        value_operator=agent.get_value_operator(), state_steps=buffer.state_steps,
    )  # fmt: skip
    loss = RecurrentClipPPOLoss(agent)
    try:
        for rollout in collector:
            assert rollout.steps.shape == (num_envs, 30)
            buffer.store(add(rollout, agent.get_value_operator()))
            for batch in buffer:
                with torch.no_grad():
                    assert loss(batch)["ratio_error"] <= 1e-5
    finally:
        collector.shutdown()


@pytest.mark.parametrize(("frames", "total", "expected"), [(13, 13, "of the 4 environments"), (12, 30, "= 12; got 30")])
def test_refusals(agent: PPOAgent, make_env: Callable, frames: int, total: int, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        RolloutCollector(
            make_env(NUM_ENVS), agent, frames_per_batch=frames, total_frames=total,
            value_operator=agent.get_value_operator(),
        )  # fmt: skip


def test_a_rollout_is_gone_before_the_next_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of long rollouts there is no room for two."""
    cfg = load_config(overrides=["env.horizon=4", "env.num_envs=8", "train.total_timesteps=144"])
    trainer = build_trainer(cfg).trainer
    there: list[ref] = []
    still: list[bool] = []
    play = trainer.collector.rollout

    def rollout() -> Rollout:
        still.append(any(each() is not None for each in there))
        played = play()
        there.extend(ref(tensor) for tensor in played.steps.values(True, True))
        return played

    monkeypatch.setattr(trainer.collector, "rollout", rollout)
    for _ in trainer.run():
        pass
    assert still == [False, False, False]
