"""The native POPGym environments as gymnasium environments, for code that does not use TorchRL.

Importing this module registers `cyborg_torchrl/popgym-RepeatPreviousEasy-v0` and an id for each other one. Gymnasium
imports it automatically if it comes before the id:

    gymnasium.make("cyborg_torchrl.envs.gym.popgym_ids:cyborg_torchrl/popgym-RepeatPreviousEasy-v0")
    gymnasium.make_vec("cyborg_torchrl/popgym-RepeatPreviousEasy-v0", 8, vectorization_mode="vector_entry_point")

Observations, actions and rewards are numpy arrays, and their spaces are those of popgym.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl.data import Categorical, Composite, MultiCategorical, TensorSpec

from cyborg_torchrl import keys
from cyborg_torchrl.envs.popgym.base import PopgymEnv
from cyborg_torchrl.envs.popgym.build import build_native, native_ids

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector.utils import batch_space
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "gymnasium is not installed: pip install 'cyborg-torchrl[gym]'", name="gymnasium"
    ) from error

NAMESPACE = "cyborg_torchrl"


class PopgymVectorEnv(gymnasium.vector.VectorEnv[Any, np.ndarray, np.ndarray]):
    """A native POPGym environment as a vector of environments.

    The step after an episode's end begins the next episode and ignores the action (autoreset mode NEXT_STEP).

    Args:
        name: a key of `native_ids()`.
        num_envs: N.
        **options: options of `build_native`.
    """

    autoreset_mode = gymnasium.vector.AutoresetMode.NEXT_STEP
    metadata = {"render_modes": [], "autoreset_mode": autoreset_mode}

    def __init__(self, name: str, num_envs: int = 1, **options: Any) -> None:
        self.torch_env: PopgymEnv = build_native(name, num_envs, **options)
        self.num_envs = num_envs
        self.single_observation_space = _space(self.torch_env.observation_spec[keys.OBSERVATION][0])
        self.single_action_space = _space(self.torch_env.action_spec[0])
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._is_over: np.ndarray | None = None

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
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
        return _observation(self.torch_env.restart()), {}

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one step in each environment, or begin the next episode where the last step ended one.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
            ValueError: if a whole number is out of range.
        """
        if self._is_over is None:
            raise gymnasium.error.ResetNeeded("call reset before the first step.")
        if not isinstance(self.action_space, spaces.Box) and not self.action_space.contains(actions):
            raise ValueError(f"actions are in {self.action_space}; got {np.asarray(actions).tolist()}.")
        is_new = self._is_over
        entries = self.torch_env.advance(torch.as_tensor(actions, device=self.torch_env.device))
        reward, terminated, truncated = (
            entries[key][:, 0].cpu().numpy() for key in (keys.REWARD, keys.TERMINATED, keys.TRUNCATED)
        )
        if is_new.any():
            entries = self.torch_env.restart(torch.as_tensor(is_new, device=self.torch_env.device))
        terminated, truncated = terminated & ~is_new, truncated & ~is_new
        self._is_over = terminated | truncated
        return _observation(entries), np.where(is_new, 0.0, reward.astype(float)), terminated, truncated, {}


class PopgymOneEnv(gymnasium.Env[Any, Any]):
    """A native POPGym environment as one environment.

    Args:
        name: a key of `native_ids()`.
        **options: options of `build_native`.
    """

    metadata = {"render_modes": []}

    def __init__(self, name: str, **options: Any) -> None:
        self.vector = PopgymVectorEnv(name, 1, **options)
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode. A seed fixes this episode and all later ones."""
        super().reset(seed=seed)
        observation, info = self.vector.reset(seed=seed)
        return _first(observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take one step.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
            ValueError: if a whole number is out of range.
        """
        observation, reward, terminated, truncated, info = self.vector.step(np.asarray(action)[None])
        return _first(observation), float(reward[0]), bool(terminated[0]), bool(truncated[0]), info


def _space(spec: TensorSpec) -> spaces.Space[Any]:
    """Return the space of a spec without batch dimensions."""
    if isinstance(spec, Composite):
        return spaces.Tuple([_space(part) for _, part in sorted(spec.items())])
    if isinstance(spec, MultiCategorical):
        return spaces.MultiDiscrete(spec.nvec.cpu().numpy())
    if isinstance(spec, Categorical):
        return spaces.Discrete(spec.n)
    low, high = spec.space.low.cpu().numpy(), spec.space.high.cpu().numpy()
    return spaces.Box(low, high, dtype=low.dtype.type)


def _observation(entries: dict[Any, Tensor]) -> Any:
    """Return the observations of all environments: an array, or a tuple of arrays."""
    if keys.OBSERVATION in entries:
        return entries[keys.OBSERVATION].cpu().numpy()
    names = sorted(key for key in entries if isinstance(key, tuple))
    return tuple(entries[name].cpu().numpy() for name in names)


def _first(observation: Any) -> Any:
    """Return the observation of the first environment."""
    return tuple(part[0] for part in observation) if isinstance(observation, tuple) else observation[0]


def register() -> None:
    """Register every id that is not registered yet."""
    for name in native_ids():
        if f"{NAMESPACE}/{name}" not in gymnasium.registry:
            gymnasium.register(
                f"{NAMESPACE}/{name}",
                entry_point=f"{__name__}:PopgymOneEnv",
                vector_entry_point=f"{__name__}:PopgymVectorEnv",
                kwargs={"name": name},
            )


register()
