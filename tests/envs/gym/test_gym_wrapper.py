"""Vectors of gymnasium environments in each autoreset mode: the ends of episodes are right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from torchrl.envs import EnvBase, GymEnv, GymWrapper, InitTracker, SerialEnv, TransformedEnv

from cyborg_torchrl.checks import check_environment
from cyborg_torchrl.collectors import FusedCollector, RolloutCollector
from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.cores import build_gru
from cyborg_torchrl.envs.gym.gym_wrapper import WrapperError, check_wrapper
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.registry import environments
from cyborg_torchrl.training.builders import build_env

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'cyborg-torchrl[gym]'")
AutoresetMode, SyncVectorEnv = gymnasium.vector.AutoresetMode, gymnasium.vector.SyncVectorEnv
spaces = gymnasium.spaces

BOX = spaces.Box(0.0, 100.0, (1,), np.float32)
KINDS: dict[str, tuple[Any, Callable[[int], Any]]] = {
    "box": (BOX, lambda t: np.array([t], np.float32)),
    "number": (spaces.Box(0.0, 100.0, (), np.float32), lambda t: np.array(t, np.float32)),
    "integers": (spaces.Box(0, 100, (1,), np.int64), lambda t: np.array([t])),
    "discrete": (spaces.Discrete(100), np.int64),
    "multi_discrete": (spaces.MultiDiscrete([100]), lambda t: np.array([t])),
    "dict": (spaces.Dict(clock=BOX), lambda t: {"clock": np.array([t], np.float32)}),
    "nested": (
        spaces.Dict(body=spaces.Dict(clock=BOX)),
        lambda t: {"body": {"clock": np.array([t], np.float32)}},
    ),
}


class Clock(gymnasium.Env):
    """Shows the number of steps since the episode began. Episodes are truncated after `length` steps."""

    action_space = spaces.Discrete(2)

    def __init__(self, kind: str, length: int) -> None:
        self.observation_space, self.show = KINDS[kind]
        self.length, self.time = length, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return self.show(0), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.time += 1
        return self.show(self.time), float(self.time), False, self.time == self.length, {}


def clocks(kind: str, mode: str) -> EnvBase:
    """Two clocks, with episodes of 3 and 4 steps."""
    makers = [partial(Clock, kind, length) for length in (3, 4)]
    env = SyncVectorEnv(makers, autoreset_mode=AutoresetMode[mode])
    return TransformedEnv(GymWrapper(env, categorical_action_encoding=True), InitTracker(), auto_unwrap=True)


def is_right(env: EnvBase) -> bool:
    """Whether each step shows the time before it, and the time after it."""
    steps = env.rollout(12, break_when_any_done=False)
    (key,) = [key for key in env.observation_spec.keys(True, True) if key != "is_init"]
    before, after = (part.get(key).reshape(2, 12).tolist() for part in (steps, steps["next"]))
    expected = [[t % length for t in range(12)] for length in (3, 4)]
    is_init = [[t == 0 for t in row] for row in expected]
    return (
        before == expected
        and after == [[t + 1 for t in row] for row in expected]
        and steps["next", "reward"].reshape(2, 12).tolist() == after
        and steps["is_init"].reshape(2, 12).tolist() == is_init
    )


RIGHT = [("DISABLED", kind) for kind in KINDS]
RIGHT += [("SAME_STEP", kind) for kind in KINDS if kind not in ("dict", "nested")]


@pytest.mark.parametrize(("mode", "kind"), RIGHT)
def test_modes_that_are_accepted_give_the_right_ends(mode: str, kind: str) -> None:
    env = clocks(kind, mode)
    check_wrapper(env)
    assert is_right(env)
    env.close()


@pytest.mark.parametrize("kind", ["dict", "nested"])
def test_same_step_with_dictionaries_is_refused_because_it_is_wrong(kind: str) -> None:
    """If this fails because the ends are right, TorchRL has been mended: then accept the mode."""
    env = clocks(kind, "SAME_STEP")
    assert not is_right(env)
    with pytest.raises(WrapperError, match=r"SAME_STEP.*DISABLED"):
        check_wrapper(env)
    env.close()


def test_parts_of_a_serial_env_are_checked() -> None:
    serial = SerialEnv(1, partial(clocks, "dict", "SAME_STEP"))
    serial.reset()
    with pytest.raises(WrapperError, match="SAME_STEP"):
        check_wrapper(serial)
    serial.close()


def test_torchrl_refuses_next_step() -> None:
    with pytest.raises(RuntimeError, match="SAME_STEP or DISABLED"):
        clocks("box", "NEXT_STEP")
    memory = gymnasium.make_vec(
        "cyborg_torchrl.envs.gym.ids:CyborgMemory/DelayedCue-v0", num_envs=2, vectorization_mode="vector_entry_point"
    )
    with pytest.raises(RuntimeError, match="SAME_STEP or DISABLED"):
        GymWrapper(memory)


@pytest.fixture
def next_step() -> EnvBase:
    """TorchRL makes this one in mode NEXT_STEP, and does not refuse it."""
    env = GymEnv("CartPole-v1", num_envs=3, categorical_action_encoding=True)
    env = TransformedEnv(env, InitTracker(), auto_unwrap=True)
    yield env
    if not env.is_closed:
        env.close()


def test_gym_env_with_several_environments_is_refused_because_it_is_wrong(next_step: EnvBase) -> None:
    """CartPole's episodes begin with numbers below 0.05. If they do here, TorchRL has been mended: then accept it."""
    next_step.set_seed(0)
    steps = next_step.rollout(60, break_when_any_done=False)
    begins = steps["observation"][steps["is_init"].squeeze(-1)]
    assert bool((begins.abs() > 0.05).any())
    with pytest.raises(WrapperError, match=r"NEXT_STEP.*SerialEnv"):
        check_wrapper(next_step)
    (finding,) = [f for f in check_environment(next_step, num_steps=40) if f.name == "wrapper"]
    assert finding.verdict == "broken"
    assert "AutoresetMode.DISABLED" in finding.detail


@pytest.mark.parametrize("collector", [RolloutCollector, FusedCollector])
def test_collectors_refuse_wrong_ends(collector: Any, next_step: EnvBase) -> None:
    encoder = build_encoder(next_step.observation_spec, batch_dims=1, features=8)
    agent = PPOAgent(encoder, Backbone(build_gru(8, hidden_size=8)), next_step.action_spec, batch_dims=1)
    options = {"value_operator": agent.get_value_operator()} if collector is RolloutCollector else {}
    with pytest.raises(ValueError, match=r"NEXT_STEP.*DISABLED"):
        collector(next_step, agent, frames_per_batch=6, total_frames=6, **options)


def test_a_configured_environment_with_wrong_ends_is_refused(
    next_step: EnvBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = lambda num_envs=3, device=None, seed=None: next_step  # noqa: E731
    monkeypatch.setitem(environments._components, "wrong_ends", builder)
    with pytest.raises(ConfigError, match=r"env: gymnasium's autoreset mode NEXT_STEP"):
        build_env(load_config(overrides=["env=wrong_ends"]))
