"""Every space of gymnasium, also of odd shapes and types: it trains, or is refused in one line that says what to do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from torchrl.envs import GymWrapper, InitTracker, SerialEnv, TransformedEnv

from cyborg_torchrl.collectors import RolloutCollector
from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.cores import build_gru
from cyborg_torchrl.data import RecurrentRolloutBuffer
from cyborg_torchrl.envs.gym.environment import wrap
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.objectives import RecurrentClipPPOLoss, add_advantages
from cyborg_torchrl.training.builders import build_trainer

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'cyborg-torchrl[gym]'")
S = gymnasium.spaces
f32, inf = np.float32, np.inf
BOX = S.Box(-1, 1, (3,), f32)
LONG = np.iinfo(np.int64)
DTYPES = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES += ["bool"]

OBSERVATIONS: dict[str, Any] = {
    **{name: S.Box(0, 1 if name == "bool" else 100, (3,), np.dtype(name)) for name in DTYPES},
    "number": S.Box(0, 1, (), f32),
    "integer": S.Box(0, 5, (), np.int64),
    "1x1": S.Box(0, 1, (1, 1), f32),
    "five dimensions": S.Box(0, 1, (2, 1, 2, 1, 2), f32),
    "five dimensions of integers": S.Box(0, 9, (2, 1, 2, 1, 2), np.int32),
    "unbounded": S.Box(-inf, inf, (3,), f32),
    "half bounded": S.Box(np.array([0, -inf, -1], f32), np.array([inf, 1, 1], f32)),
    "constant": S.Box(1, 1, (2,), f32),
    "unbounded integers": S.Box(LONG.min, LONG.max, (2,), np.int64),
    "bool 2 x 2": S.Box(0, 1, (2, 2), bool),
    "grid": S.Box(0, 255, (7, 7, 3), np.uint8),
    "picture": S.Box(0, 255, (36, 36, 3), np.uint8),
    "bytes 5 x 5": S.Box(0, 255, (5, 5), np.uint8),
    "picture of floats": S.Box(0, 1, (3, 36, 36), f32),
    "stack": S.Box(0, 255, (2, 36, 36, 3), np.uint8),
    "discrete": S.Discrete(4),
    "discrete from -2": S.Discrete(4, start=-2),
    "one category": S.Discrete(1),
    "multi-discrete": S.MultiDiscrete([2, 3]),
    "multi-discrete 2 x 2": S.MultiDiscrete([[2, 3], [4, 5]]),
    "multi-discrete with starts": S.MultiDiscrete([2, 3], start=[5, -1]),
    "multi-binary": S.MultiBinary(3),
    "multi-binary 2 x 3": S.MultiBinary([2, 3]),
    "tuple": S.Tuple((BOX, S.Discrete(3))),
    "dict": S.Dict(a=BOX, b=S.Discrete(3)),
    "nested": S.Dict(a=S.Dict(b=S.Tuple((BOX, S.MultiBinary(2)))), c=S.Discrete(2, start=1)),
    "names with dots": S.Dict({"a.b": BOX, "c": BOX}),
    "dict with text": S.Dict(a=BOX, t=S.Text(5)),
    "dict with sequence": S.Dict(a=BOX, t=S.Sequence(BOX)),
    "dict with graph": S.Dict(a=BOX, t=S.Graph(S.Box(0, 1, (2,), f32), None)),
    "dict with alternatives": S.Dict(a=BOX, t=S.OneOf((BOX, S.Discrete(2)))),
    "dict with an empty array": S.Dict(a=BOX, t=S.Box(0, 1, (0,), f32)),
}
UNREADABLE: dict[str, Any] = {
    "empty": S.Box(0, 1, (0,), f32),
    "2 x 0": S.Box(0, 1, (2, 0), f32),
    "empty dict": S.Dict({}),
    "empty tuple": S.Tuple(()),
    "text": S.Text(5),
    "graph": S.Graph(S.Box(0, 1, (2,), f32), S.Discrete(2)),
    "sequence": S.Sequence(BOX),
    "stacked sequence": S.Sequence(BOX, stack=True),
    "alternatives": S.OneOf((BOX, S.Discrete(2))),
}
ACTIONS: dict[str, Any] = {
    "discrete": S.Discrete(3),
    "discrete from 5": S.Discrete(3, start=5),
    "one choice": S.Discrete(1),
    "multi-discrete": S.MultiDiscrete([2, 3]),
    "multi-discrete of one": S.MultiDiscrete([3]),
    "multi-discrete with starts": S.MultiDiscrete([2, 3], start=[1, -4]),
    "multi-discrete 2 x 2": S.MultiDiscrete([[2, 3], [4, 5]]),
    "multi-binary": S.MultiBinary(3),
    "multi-binary 2 x 3": S.MultiBinary([2, 3]),
    "box": BOX,
    "float64": S.Box(-1, 1, (2,), np.float64),
    "float16": S.Box(-1, 1, (2,), np.float16),
    "number": S.Box(-1, 1, (), f32),
    "1 x 1": S.Box(-1, 1, (1, 1), f32),
    "2 x 2": S.Box(-1, 1, (2, 2), f32),
    "unbounded": S.Box(-inf, inf, (2,), f32),
    "half bounded": S.Box(0, inf, (2,), f32),
    "asymmetric": S.Box(np.array([0, -3], f32), np.array([1, 9], f32)),
    "constant": S.Box(1, 1, (2,), f32),
    "integers": S.Box(-2, 3, (2,), np.int64),
    "bytes": S.Box(0, 255, (2,), np.uint8),
    "bool": S.Box(0, 1, (2, 2), bool),
}
WITHOUT_POLICY: dict[str, Any] = {
    "empty": S.Box(-1, 1, (0,), f32),
    "many integers": S.Box(0, 1000, (2,), np.int64),
    "unbounded integers": S.Box(LONG.min, LONG.max, (2,), np.int64),
    "tuple": S.Tuple((S.Discrete(2), BOX)),
    "dict": S.Dict(a=S.Discrete(2), b=BOX),
    "text": S.Text(3),
    "graph": S.Graph(BOX, None),
    "sequence": S.Sequence(S.Discrete(2)),
    "alternatives": S.OneOf((S.Discrete(2), BOX)),
}


class Sampled(gymnasium.Env):
    """Shows samples of its observation space; refuses an action that is not in its action space."""

    def __init__(self, observation: Any, action: Any) -> None:
        self.observation_space, self.action_space = observation, action
        self.time = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.time += 1
        return self.observation_space.sample(), 1.0, False, self.time == 4, {}


@pytest.fixture
def command() -> Iterator[Callable[[Any, Any], None]]:
    """Train for one update as the command line does."""

    def train(observation: Any, action: Any) -> None:
        gymnasium.register("CyborgTests/Sampled-v0", entry_point=lambda: Sampled(observation, action))
        cfg = load_config(
            overrides=[
                "env=gymnasium", "env.id=CyborgTests/Sampled-v0", "env.num_envs=2", "train=tbptt", "train.n_steps=8",
                "train.seq_len=4", "train.n_epochs=1", "train.num_minibatches=1", "train.total_timesteps=16",
                "encoder.features=8", "backbone.hidden_size=16",
            ]
        )  # fmt: skip
        trainer, _, _ = build_trainer(cfg)
        (metrics,) = list(trainer.run())
        assert metrics["ratio_error"] <= 1e-4

    yield train
    gymnasium.registry.pop("CyborgTests/Sampled-v0", None)


def script(observation: Any, action: Any, wrapper: Callable[[Any], Any]) -> None:
    """Train for one update in a script, with TorchRL's wrapper."""
    makers = lambda: GymWrapper(wrapper(Sampled(observation, action)), categorical_action_encoding=True)  # noqa: E731
    env = TransformedEnv(SerialEnv(2, makers), InitTracker())
    encoder = build_encoder(env.observation_spec, batch_dims=1, features=8)
    agent = PPOAgent(encoder, Backbone(build_gru(8, hidden_size=16)), env.action_spec, batch_dims=1)
    value = agent.get_value_operator()
    buffer = RecurrentRolloutBuffer(16, 4, 2, num_envs=2)
    collector = RolloutCollector(
        env, agent, frames_per_batch=16, total_frames=16, value_operator=value, state_steps=buffer.state_steps
    )
    loss = RecurrentClipPPOLoss(agent)
    for rollout in collector:
        buffer.store(add_advantages(rollout, value, gamma=0.9, gae_lambda=0.9))
        for batch in buffer:
            losses = loss(batch)
            (losses["loss_objective"] + losses["loss_critic"]).backward()
            assert losses["ratio_error"] <= 1e-4


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observations_train(name: str, command: Callable[[Any, Any], None]) -> None:
    command(OBSERVATIONS[name], S.Discrete(2))
    script(OBSERVATIONS[name], S.Discrete(2), wrap)


@pytest.mark.parametrize("name", ACTIONS)
def test_actions_train(name: str, command: Callable[[Any, Any], None]) -> None:
    command(BOX, ACTIONS[name])
    script(BOX, ACTIONS[name], wrap)


@pytest.mark.parametrize("name", UNREADABLE)
def test_observations_that_cannot_be_read_are_refused(name: str, command: Callable[[Any, Any], None]) -> None:
    message = r"^env: nothing of the observation space [^\n]* can be read: convert it in a gymnasium.ObservationWrapper"
    with pytest.raises(ConfigError, match=message) as caught:
        command(UNREADABLE[name], S.Discrete(2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WITHOUT_POLICY)
def test_actions_without_a_policy_are_refused(name: str, command: Callable[[Any, Any], None]) -> None:
    message = r"^env: there is no policy for actions in [^\n]*: convert it in a gymnasium.ActionWrapper to Discrete"
    with pytest.raises(ConfigError, match=message) as caught:
        command(BOX, WITHOUT_POLICY[name])
    assert "\n" not in str(caught.value)


CONVERT = r"use GymWrapper\(cyborg_torchrl\.envs\.gym\.environment\.wrap\(env\)\)"


@pytest.mark.parametrize(
    ("observation", "action"),
    [
        (S.Discrete(4, start=-2), S.Discrete(2)),
        (S.Dict(a=BOX, b=S.MultiDiscrete([2, 3], start=[5, -1])), S.Discrete(2)),
        (BOX, S.Discrete(3, start=5)),
        (BOX, S.MultiDiscrete([2, 3], start=[1, -4])),
        (BOX, S.Box(-1, 1, (), f32)),
        (BOX, S.MultiDiscrete([3])),
        (BOX, S.MultiBinary(3)),
        (BOX, S.Box(-1, 1, (2, 2), f32)),
        (BOX, S.Box(0, 3, (2,), np.int64)),
        (BOX, S.Box(0, 1, (2,), bool)),
    ],
)
def test_what_torchrls_wrapper_gets_wrong_is_refused(observation: Any, action: Any) -> None:
    """TorchRL builds all of these. The environment would get other actions, or the agent other categories."""
    with pytest.raises(ValueError, match=CONVERT):
        script(observation, action, lambda env: env)


def test_a_part_that_is_not_read_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    space = S.Dict(a=BOX, words=S.Text(4), points=S.Sequence(S.Box(0, 1, (7,), f32)))
    with caplog.at_level(logging.WARNING):
        envs = [wrap(Sampled(space, S.Discrete(2))) for _ in range(3)]
    assert set(envs[0].reset()[0]["observation"]) == {"a"}
    (record,) = [record for record in caplog.records if "is not read" in record.message]
    assert record.message.startswith("the observation 'points' in Sequence(Box(0.0, 1.0, (7,), float32)")
