"""The memory tasks as gymnasium environments, for code that does not use TorchRL.

Importing this module registers `CyborgMemory/DelayedCue-v0` and an id for each other task. Gymnasium imports it
automatically if it comes before the id:

    gymnasium.make("cyborg_torchrl.envs.gym.ids:CyborgMemory/DelayedCue-v0", horizon=20)
    gymnasium.make_vec("CyborgMemory/DelayedCue-v0", num_envs=8, horizon=20)

The options are those of the task's class. Observations, actions and rewards are numpy arrays. `info["success"]` exists
at the last step of an episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cyborg_torchrl import envs, keys
from cyborg_torchrl.envs.memory.task import MemoryTask

try:
    import gymnasium
    from gymnasium.vector.utils import batch_space
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "gymnasium is not installed: pip install 'cyborg-torchrl[gym]'", name="gymnasium"
    ) from error

NAMESPACE = "CyborgMemory"


def task_ids() -> dict[str, type[MemoryTask]]:
    """Return every id with its task."""
    classes = (getattr(envs, name) for name in envs.__all__ if name.endswith("Env"))
    tasks = [c for c in classes if isinstance(c, type) and issubclass(c, MemoryTask)]
    return {f"{NAMESPACE}/{task.__name__.removesuffix('Env')}-v0": task for task in tasks}


class MemoryTaskEnv(gymnasium.Env[np.ndarray, np.int64]):
    """A memory task as one environment.

    Args:
        task: name of the task's class.
        **options: options of the task.

    Raises:
        ValueError: if the task rejects an option.
    """

    metadata = {"render_modes": []}

    def __init__(self, task: str, **options: Any) -> None:
        self.torch_env: MemoryTask = getattr(envs, task)(1, **options)
        self.observation_space, self.action_space = _spaces(self.torch_env)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode. A seed fixes this episode and all later ones."""
        super().reset(seed=seed)
        if seed is not None:
            self.torch_env.set_seed(seed)
        observation, _ = self.torch_env.restart()
        return observation[0].cpu().numpy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one step.

        Raises:
            ValueError: if the action is out of range.
        """
        observation, success, reward, terminated = _advance(self.torch_env, np.asarray([action]))
        info = {"success": success.item()} if terminated.item() else {}
        return observation[0], reward.item(), terminated.item(), False, info


class MemoryTaskVectorEnv(gymnasium.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """A memory task as a vector of environments.

    The step after an episode's end begins the next episode and ignores the action (autoreset mode NEXT_STEP).

    Args:
        task: name of the task's class.
        num_envs: N.
        **options: options of the task.

    Raises:
        ValueError: if the task rejects an option.
    """

    autoreset_mode = gymnasium.vector.AutoresetMode.NEXT_STEP
    metadata = {"render_modes": [], "autoreset_mode": autoreset_mode}

    def __init__(self, task: str, num_envs: int = 1, **options: Any) -> None:
        self.torch_env: MemoryTask = getattr(envs, task)(num_envs, **options)
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = _spaces(self.torch_env)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._is_over: np.ndarray | None = None

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode in every environment.

        Args:
            seed: one seed for all environments.
            options: not used.

        Raises:
            ValueError: if there is a list of seeds: the environments share one generator.
        """
        if seed is not None and not isinstance(seed, (int, np.integer)):
            raise ValueError(f"the environments share one generator: give one seed, not {len(seed)}.")
        super().reset(seed=seed)
        if seed is not None:
            self.torch_env.set_seed(int(seed))
        self._is_over = np.zeros(self.num_envs, dtype=np.bool_)
        observation, _ = self.torch_env.restart()
        return observation.cpu().numpy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one step in each environment, or begin the next episode where the last step ended one.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
            ValueError: if an action is out of range.
        """
        if self._is_over is None:
            raise gymnasium.error.ResetNeeded("call reset before the first step.")
        is_new = self._is_over
        observation, success, reward, terminated = _advance(self.torch_env, np.where(is_new, 0, actions))
        if is_new.any():
            begun, _ = self.torch_env.restart(torch.as_tensor(is_new, device=self.torch_env.device))
            observation = begun.cpu().numpy()
        reward = np.where(is_new, 0.0, reward[:, 0].astype(float))
        is_over = terminated[:, 0] & ~is_new
        self._is_over = is_over.copy()
        info = {"success": np.where(is_over, success[:, 0], 0).astype(success.dtype), "_success": is_over}
        truncated = np.zeros_like(is_over)
        return observation, reward, is_over.copy(), truncated, info if is_over.any() else {}


def _spaces(env: MemoryTask) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Discrete]:
    space = env.observation_spec[keys.OBSERVATION].space
    low, high = (getattr(space, name)[0].cpu().numpy() for name in ("low", "high"))
    return gymnasium.spaces.Box(low, high, dtype=low.dtype.type), gymnasium.spaces.Discrete(env.action_spec.n)


def _advance(env: MemoryTask, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Take a step; return the observation [N, F], success, reward and terminated, each [N, 1]."""
    most = env.action_spec.n - 1
    if not np.issubdtype(actions.dtype, np.integer) or actions.min() < 0 or actions.max() > most:
        raise ValueError(f"actions are whole numbers from 0 to {most}; got {actions.tolist()}.")
    action = torch.as_tensor(actions, dtype=torch.long, device=env.device)
    observation, success, reward, terminated = (tensor.cpu().numpy() for tensor in env.advance(action))
    return observation, success, reward, terminated


def register() -> None:
    """Register every id that is not registered yet."""
    for name, task in task_ids().items():
        if name not in gymnasium.registry:
            gymnasium.register(
                name,
                entry_point=f"{__name__}:MemoryTaskEnv",
                vector_entry_point=f"{__name__}:MemoryTaskVectorEnv",
                kwargs={"task": task.__name__},
            )


register()
