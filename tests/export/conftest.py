"""A gymnasium environment with every kind of action and of observation."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

ACTIONS = {
    "discrete": spaces.Discrete(5),
    "multi_discrete": spaces.MultiDiscrete([3, 2, 4]),
    "continuous": spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32)),
}
OBSERVATIONS = {
    "vector": spaces.Box(-3.0, 3.0, (4,), np.float32),
    "pixels": spaces.Box(0, 255, (36, 36, 3), np.uint8),
    "mixed": spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (36, 36, 3), np.uint8),
            "grid": spaces.Box(0, 10, (7, 7, 3), np.uint8),
            "tool": spaces.Discrete(6),
            "speed": spaces.Box(-3.0, 3.0, (2,), np.float32),
        }
    ),
}


class NoiseGame(gymnasium.Env[Any, Any]):
    """Random observations; episodes end at random. With `masked`, about half of the options are valid."""

    def __init__(self, observation: str = "vector", action: str = "discrete", masked: bool = False) -> None:
        self.masked = masked
        # spaces have random numbers of their own
        self.observation_space, self.action_space = deepcopy(OBSERVATIONS[observation]), deepcopy(ACTIONS[action])

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        is_over = bool(self.np_random.random() < 0.05)
        return self.observation_space.sample(), float(self.np_random.normal()), is_over, False, self._info()

    def _info(self) -> dict[str, Any]:
        if not self.masked:
            return {}
        space = self.action_space
        sizes = [int(space.n)] if isinstance(space, spaces.Discrete) else [int(n) for n in space.nvec]
        masks = [self.np_random.random(n) < 0.5 for n in sizes]
        for mask in masks:
            mask[self.np_random.integers(len(mask))] = True
        return {"action_mask": tuple(masks) if len(masks) > 1 else masks[0]}


gymnasium.register("DeploymentTest/Noise-v0", NoiseGame, max_episode_steps=60)
