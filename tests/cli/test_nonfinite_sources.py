"""One environment shows NaN or infinity: the error names entry, environment and step, whatever it meets first."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from cyborg_torchrl.config import load_config
from cyborg_torchrl.envs.gym.batch import batch
from cyborg_torchrl.envs.gym.environment import wrap
from cyborg_torchrl.envs.transforms.normalization import RunningMoments
from cyborg_torchrl.modules.nan_check import NonFiniteError
from cyborg_torchrl.registry import environments
from cyborg_torchrl.training.builders import build_trainer

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'cyborg-torchrl[gym]'")
spaces = gymnasium.spaces

NUM_ENVS, SICK, EPISODE, AFTER, STEPS = 3, 2, 5, 13, 10
"""The environment SICK is sick in its step AFTER, counted from 1, and afterwards; a rollout has STEPS steps."""
ACTIONS = {
    "discrete": spaces.Discrete(2),
    "multi": spaces.MultiDiscrete([2, 3]),
    "continuous": spaces.Box(-1.0, 1.0, (2,), np.float32),
}


class Sick(gymnasium.Env):
    """Shows a number that is not finite; refuses an action that is not finite."""

    def __init__(self, where: str, actions: str, value: float) -> None:
        box = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.observation_space = spaces.Dict(body=box, extra=spaces.Dict(deep=box))
        self.action_space = ACTIONS[actions]
        self.where, self.value, self.steps, self.time = where, value, 0, 0

    def _show(self, *, at_end: bool = False, at_reset: bool = False) -> dict[str, Any]:
        seen = {"body": np.ones(2, np.float32), "extra": {"deep": self.np_random.normal(size=2).astype(np.float32)}}
        is_sick = self.steps >= AFTER
        if is_sick and (self.where == "body" or (self.where, at_end) == ("last", True)):
            seen["body"][1] = self.value
        if is_sick and (self.where == "deep" or (self.where, at_reset) == ("reset", True)):
            seen["extra"]["deep"][0] = self.value
        return seen

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return self._show(at_reset=True), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert np.isfinite(action).all(), f"the environment got the action {action}"
        self.time, self.steps = self.time + 1, self.steps + 1
        is_over = self.time == EPISODE
        reward = self.value if self.where == "reward" and self.steps >= AFTER else 1.0
        return self._show(at_end=is_over), reward, False, is_over, {}


def make(where: str, actions: str, value: float) -> gymnasium.Env:
    return wrap(Sick(where, actions, value))


@pytest.fixture
def sick_envs() -> Iterator[None]:
    def build(num_envs=NUM_ENVS, *, where="", actions="discrete", value=0.0, device=None, seed=None):
        makers = [partial(make, where if i == SICK else "nowhere", actions, value) for i in range(num_envs)]
        return batch(makers, num_envs, device=device, seed=seed)

    build.__annotations__ |= {"where": str, "actions": str, "value": float}
    environments.register("sick")(build)
    yield
    del environments._components["sick"]


BODY, DEEP = "observation/body", "observation/extra/deep"
# In the second rollout the sick step has the number 13 - 1 - 10 = 2. The observation after it is that of step 3.
CASES = [
    ("body", "discrete", "nan", [], BODY, 3),
    ("body", "multi", "nan", [], BODY, 3),
    ("body", "continuous", "nan", [], BODY, 3),
    ("body", "continuous", "inf", ["agent.squash=true"], BODY, 3),
    ("body", "continuous", "inf", ["backbone=mamba"], BODY, 3),
    ("deep", "discrete", "-inf", [], DEEP, 3),
    ("deep", "continuous", "nan", ["transforms.normalize_observation=true"], DEEP, 3),
    ("body", "discrete", "inf", ["transforms.normalize_observation=true"], BODY, 3),
    ("last", "discrete", "nan", [], f"next/{BODY}", 4),
    ("last", "discrete", "nan", ["agent.separate_critic=true"], f"next/{BODY}", 4),
    ("last", "continuous", "nan", ["transforms.normalize_observation=true"], f"next/{BODY}", 4),
    ("reset", "continuous", "nan", [], DEEP, 5),
    ("reward", "continuous", "inf", [], "next/reward", 2),
    ("reward", "discrete", "nan", ["transforms.normalize_reward=true"], "next/reward", 2),
    ("reward", "discrete", "inf", ["transforms.clip_reward=1"], "next/episode_reward", 2),
    ("body", "continuous", "nan", ["collector=fused"], BODY, 3),
    ("body", "multi", "nan", ["collector=fused"], BODY, 3),
    ("last", "discrete", "nan", ["collector=fused"], f"next/{BODY}", 4),
    ("body", "discrete", "nan", ["collector=single"], BODY, 3),
    ("body", "continuous", "nan", ["collector=single"], BODY, 3),
    ("last", "continuous", "nan", ["collector=single"], f"next/{BODY}", 4),
]


@pytest.mark.parametrize(("where", "actions", "value", "options", "entry", "step"), CASES)
def test_entry_environment_and_step(sick_envs, where, actions, value, options, entry, step) -> None:
    cfg = load_config(
        overrides=[
            "env=sick", f"env.where={where}", f"env.actions={actions}", f"env.value={value}", "train=tbptt",
            f"train.n_steps={STEPS}", "train.seq_len=5", f"train.total_timesteps={3 * STEPS * NUM_ENVS}",
            "train.n_epochs=1", "train.num_minibatches=2", "encoder.features=8", "backbone.hidden_size=16", *options,
        ]
    )  # fmt: skip
    trainer, agent, _ = build_trainer(cfg)
    message = rf"^'{entry}' is {value} in environment {SICK} at step {step} of the rollout$"
    with pytest.raises(NonFiniteError, match=message):
        list(trainer.run())
    assert trainer.num_updates == 1
    assert all(parameter.isfinite().all() for parameter in agent.parameters())
    trainer.close()


def test_moments_leave_out_numbers_that_are_not_finite() -> None:
    items = torch.randn(6, 3)
    moments, expected = RunningMoments([3]), RunningMoments([3])
    expected.update(items)
    items[4, 1] = torch.nan
    items[2, 2] = torch.inf
    moments.update(items)
    assert torch.equal(moments.mean[0], expected.mean[0])
    assert moments.mean[1:].tolist() == [0.0, 0.0]
    assert moments.var[1:].tolist() == [1.0, 1.0]
