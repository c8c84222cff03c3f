"""The task that every library acts in, and helpers of the adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

NUM_ENVS, STEPS, FEATURES, ACTIONS, WIDTH = 4, 24, 3, 3, 16
EPISODE_LIMIT = 9


class NoiseEnv(gymnasium.Env):
    """Observations are noise; episodes end at random or are truncated after nine steps.

    The checks look at memory and not at learning, so the task holds nothing to learn. Rewards depend on the action.

    Args:
        seed: seed of the noise and of the ends.
        is_continuous: whether actions are a vector in [-1, 1] or one of three numbers.
    """

    def __init__(self, seed: int, *, is_continuous: bool = False) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (FEATURES,), np.float32)
        box = gymnasium.spaces.Box(-1.0, 1.0, (ACTIONS,), np.float32)
        self.action_space = box if is_continuous else gymnasium.spaces.Discrete(ACTIONS)
        self.random = np.random.default_rng(seed)
        self.time = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Begin an episode."""
        self.time = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Return noise; an episode terminates with probability 0.1."""
        self.time += 1
        terminated = bool(self.random.random() < 0.1)
        truncated = not terminated and self.time >= EPISODE_LIMIT
        return self._observe(), float(np.sum(action)), terminated, truncated, {}

    def _observe(self) -> np.ndarray:
        return self.random.normal(size=FEATURES).astype(np.float32)


def draw(seed: int, steps: int = 48) -> Tensor:
    """Return observations [NUM_ENVS, steps, FEATURES]."""
    return torch.randn(NUM_ENVS, steps, FEATURES, generator=torch.Generator().manual_seed(seed))


def parameters_after(modules: Iterable[torch.nn.Module], optimizer: Any, train: Callable[[], Any]) -> list[Tensor]:
    """Train, return copies of all parameters, and restore parameters and optimiser. Torch and numpy draw the same."""
    modules = list(modules)
    before = [copy.deepcopy(module.state_dict()) for module in modules]
    state = copy.deepcopy(optimizer.state_dict())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  (the libraries draw from the global generator)
        train()
    after = [parameter.detach().clone() for module in modules for parameter in module.parameters()]
    for module, values in zip(modules, before, strict=True):
        module.load_state_dict(values)
    optimizer.load_state_dict(state)
    return after
