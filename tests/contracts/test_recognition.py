"""What is recognised by its name or class is not mistaken for something else (the table in docs/architecture.md)."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDictBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase, GymWrapper, InitTracker, TransformedEnv

from cyborg_torchrl.collectors import RolloutCollector
from cyborg_torchrl.collectors.fused_env import env_step
from cyborg_torchrl.collectors.fused_policy import policy_step
from cyborg_torchrl.collectors.resume import collector_state, resume_collector
from cyborg_torchrl.cores import build_gru
from cyborg_torchrl.envs import DelayedCueEnv
from cyborg_torchrl.envs.gym.gym_wrapper import WrapperError, check_wrapper
from cyborg_torchrl.envs.gym.public_benchmarks import _is_out_of_time
from cyborg_torchrl.envs.state import environment_state, set_environment_state
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.modules.encoders.build import default_observations


def build(env: EnvBase, backbone_class: type[Backbone] = Backbone) -> PPOAgent:
    torch.manual_seed(0)
    encoder = build_encoder(env.observation_spec, batch_dims=1, features=8)
    return PPOAgent(encoder, backbone_class(build_gru(8, hidden_size=8)), env.action_spec, batch_dims=1)


def collector_of(env: EnvBase, agent: PPOAgent, kind: type[RolloutCollector] = RolloutCollector) -> RolloutCollector:
    return kind(env, agent, frames_per_batch=24, total_frames=240, value_operator=agent.get_value_operator())


class Doubled(DelayedCueEnv):
    """A native task whose `_step` is another one, which `advance` does not know of."""

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        following = super()._step(tensordict)
        return following.set("reward", following["reward"] + 100.0)


def test_a_subclass_of_a_native_task_with_another_step() -> None:
    env = TransformedEnv(Doubled(4, horizon=3, seed=0), InitTracker())
    stepper, reason = env_step(env)
    assert type(stepper).__name__ == "OpaqueEnv"
    assert "another _step" in reason
    rollout = collector_of(env, build(env)).rollout()
    assert bool((rollout.steps["next", "reward"] >= 99.0).all())


class Blank(Backbone):
    """A backbone whose step forgets; it has the `forward` of its base."""

    def _run_step(self, tensordict: TensorDictBase) -> Any:
        state = super()._run_step(tensordict)
        tensordict.set(self.out_key, torch.zeros_like(tensordict.get(self.out_key)))
        return state


def test_a_subclass_of_the_backbone_with_another_step() -> None:
    env = TransformedEnv(DelayedCueEnv(4, horizon=3, seed=0), InitTracker())
    agent = build(env, Blank)
    assert type(policy_step(agent, env)).__name__ == "OpaquePolicy"
    td = collector_of(env, agent).env.reset()
    td["observation"] = torch.zeros_like(td["observation"])
    assert torch.equal(agent(td)["state_value"], torch.zeros(4, 1))


class Logged(RolloutCollector):
    """A user's subclass, defined outside the package."""


def test_a_subclass_of_the_collector_is_resumed() -> None:
    envs = [TransformedEnv(DelayedCueEnv(4, horizon=3, seed=seed), InitTracker()) for seed in (0, 1)]
    first, second = (collector_of(env, build(env), Logged) for env in envs)
    first.rollout()
    state = collector_state(first)
    assert state is not None
    assert resume_collector(second, state) == 0
    torch.manual_seed(0)
    expected = first.rollout().steps
    torch.manual_seed(0)
    assert torch.equal(second.rollout().steps["observation"], expected["observation"])


def test_a_plain_iterable_as_collector_has_no_state() -> None:
    assert collector_state([]) is None


def test_an_environment_with_half_of_the_contract_has_no_state() -> None:
    class OnlyGet(EnvBase):
        """A robot simulator's idea of `get_state`, with an argument."""

        def get_state(self, joint: int) -> int:
            return joint

        _reset = _step = _set_seed = None

    env = OnlyGet(batch_size=[2])
    assert environment_state(env) is None


def test_a_state_that_is_set_without_an_answer_lost_nothing() -> None:
    class Silent(DelayedCueEnv):
        def set_state(self, state: dict[str, Any]) -> None:
            super().set_state(state)

    env = Silent(3, horizon=3, seed=0)
    assert set_environment_state(env, environment_state(env)).tolist() == [False] * 3


@pytest.mark.parametrize("name", ["action", "next", "is_init"])
def test_observations_with_the_names_of_torchrls_entries(name: str) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    box = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    class Named(gymnasium.Env):
        observation_space = gymnasium.spaces.Dict({name: box, "body": box})
        action_space = gymnasium.spaces.Discrete(2)

    with pytest.raises(WrapperError, match=rf"entries called {name} itself.*wrap\(env\)"):
        check_wrapper(GymWrapper(Named()))


def test_observations_that_are_not_read_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Goal environments of gymnasium have three entries, of which "observation" alone is read by default."""
    parts = {key: Unbounded((3, 2)) for key in ("observation", "desired_goal", "success", "is_init", "previous_reward")}
    spec = Composite(parts, shape=[3])
    with caplog.at_level(logging.WARNING):
        encoder = build_encoder(spec, batch_dims=1)
    assert encoder.in_keys == ["observation", "previous_reward"]
    (record,) = caplog.records
    assert record.message.startswith("the observations desired_goal are not read, since there is 'observation'")
    caplog.clear()
    build_encoder(spec, batch_dims=1, observation_keys=["observation", "desired_goal"])
    default_observations(spec)
    assert not caplog.records


def test_no_clock_is_not_a_time_limit() -> None:
    """An environment without the attributes `t` and `max_episode_steps` has not reached its limit."""
    assert not _is_out_of_time(SimpleNamespace(), {})
    assert not _is_out_of_time(SimpleNamespace(t=4, max_episode_steps=5), {})
    assert _is_out_of_time(SimpleNamespace(t=5, max_episode_steps=5), {})
