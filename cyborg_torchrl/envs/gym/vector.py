"""Wrappers of one gymnasium environment. Needs gymnasium."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from cyborg_torchrl import keys
from cyborg_torchrl.modules.encoders.images import is_picture

Info = dict[str, Any]
Stepped = tuple[Any, float, bool, bool, Info]
SUCCESS_KEYS = (keys.SUCCESS, "is_success")
"""Entries of gymnasium's info that report success; the first that is there counts."""


class FrameSkip(gymnasium.Wrapper):
    """Repetition of each action until the episode ends; rewards are summed.

    Args:
        env: the environment.
        frames: environment steps for each action.
    """

    def __init__(self, env: gymnasium.Env, frames: int) -> None:
        super().__init__(env)
        self.frames = frames

    def step(self, action: Any) -> Stepped:
        """Take up to `frames` steps with one action."""
        total = 0.0
        for _ in range(self.frames):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info  # pyright: ignore[reportPossiblyUnboundVariable]


class PlainActions(gymnasium.ActionWrapper):
    """Action spaces that have a policy: discrete actions start at 0, continuous ones are clipped to their bounds.

    Gymnasium's `ClipAction` would make the bounds infinite.

    Raises:
        ValueError: if no policy has such actions.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        space = env.action_space
        self.start: Any = 0
        if isinstance(space, spaces.Discrete) or (isinstance(space, spaces.MultiDiscrete) and len(space.shape) == 1):
            self.start = space.start
            self.action_space = _plain_space(space)
        elif not (isinstance(space, spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f"):
            raise ValueError(
                f"there is no policy for actions in {' '.join(str(space).split())}: it takes Discrete, MultiDiscrete "
                "of one dimension, and Box of one dimension and floats."
            )

    def action(self, action: Any) -> Any:
        """Return the action that the environment takes."""
        if isinstance(self.action_space, spaces.Box):
            return np.clip(action, self.action_space.low, self.action_space.high)
        return action + self.start


class Reported(gymnasium.Wrapper):
    """Correct ends of episodes, and `info["success"]` at every step of environments with a rule for success.

    `metadata["reports_success"]` says whether they have one. Without it, what the environment itself reports is kept.

    Args:
        env: the environment.
        is_success: returns whether the episode ended in success, from reward, terminated and info.
        is_time_limit: returns whether a termination was really the time limit, from the environment and info.
        options: options of each reset.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        *,
        is_success: Callable[[float, bool, Info], bool] | None = None,
        is_time_limit: Callable[[gymnasium.Env, Info], bool] | None = None,
        options: Info | None = None,
    ) -> None:
        super().__init__(env)
        self.is_success, self.is_time_limit, self.options = is_success, is_time_limit, options
        self.metadata = {**env.metadata, "reports_success": is_success is not None}

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[Any, Info]:
        """Reset with the options of the constructor."""
        observation, info = self.env.reset(seed=seed, options=self.options)
        return observation, self._reports(info, is_success=False)

    def step(self, action: Any) -> Stepped:
        """Take a step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        is_success = self.is_success is not None and self.is_success(float(reward), terminated, info)
        if terminated and self.is_time_limit is not None and self.is_time_limit(self.unwrapped, info):
            terminated, truncated = False, True
        return observation, float(reward), bool(terminated), bool(truncated), self._reports(info, is_success=is_success)

    def _reports(self, info: Info, *, is_success: bool) -> Info:
        if self.is_success is not None:
            return {keys.SUCCESS: is_success}
        return {key: info[key] for key in SUCCESS_KEYS if key in info}


class SuccessFromInfo(gymnasium.Wrapper):
    """`info["success"]` as a float where the environment reports `success` or `is_success`, without it elsewhere."""

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[Any, Info]:
        """Reset. The report of a reset is not one of an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {key: value for key, value in info.items() if key != keys.SUCCESS}

    def step(self, action: Any) -> Stepped:
        """Take a step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        reports = (_as_number(info[key]) for key in SUCCESS_KEYS if key in info)
        success = next((report for report in reports if report is not None), None)
        info = {key: value for key, value in info.items() if key != keys.SUCCESS}
        if success is not None:
            info[keys.SUCCESS] = success
        return observation, float(reward), terminated, truncated, info


class Visible(gymnasium.ObservationWrapper):
    """Some numbers of a vector observation, such as positions without velocities.

    Args:
        env: the environment.
        entries: indices of the numbers that are shown.

    Raises:
        ValueError: if the observation is no vector, or an index is out of range.
    """

    def __init__(self, env: gymnasium.Env, entries: Sequence[int]) -> None:
        super().__init__(env)
        space, self.entries = env.observation_space, np.array(entries, dtype=np.int64)
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ValueError(
                f"visible chooses numbers of a vector; the observations are {' '.join(str(space).split())}."
            )
        if not len(entries) or self.entries.min() < 0 or self.entries.max() >= space.shape[0]:
            raise ValueError(f"visible has indices from 0 to {space.shape[0] - 1}; got {list(entries)}.")
        self.observation_space = spaces.Box(space.low[self.entries], space.high[self.entries], dtype=space.dtype.type)

    def observation(self, observation: Any) -> Any:
        """Return the visible numbers."""
        return observation[self.entries]


class Plain(gymnasium.ObservationWrapper):
    """Observation spaces that every encoder can read.

    Tuples become dictionaries ("0", "1", ...), texts are dropped, discrete spaces start at 0. The result has the key
    "pixels" if it is one picture, else "observation".
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.inner = env.observation_space
        space = _plain_space(self.inner)
        if space is None:
            raise ValueError(f"nothing of the observation space {self.inner} can be read.")
        is_image = isinstance(space, spaces.Box) and is_picture(space.shape)
        self.key = "pixels" if is_image else "observation"
        self.observation_space = spaces.Dict({self.key: space})

    def observation(self, observation: Any) -> Info:
        """Convert an observation."""
        return {self.key: _plain_value(self.inner, observation)}


class MaskFromInfo(gymnasium.Wrapper):
    """`info["action_mask"]` as an entry of the observation, next to the others.

    A mask of several choices may be a tuple of masks. They are joined.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        space = env.action_space
        size = int(space.n) if isinstance(space, spaces.Discrete) else int(np.sum(space.nvec))
        assert isinstance(env.observation_space, spaces.Dict)
        entries = {**env.observation_space.spaces, keys.ACTION_MASK: spaces.MultiBinary(size)}
        self.observation_space = spaces.Dict(entries)

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[Any, Info]:
        """Reset, and add the mask."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._masked(observation, info), info

    def step(self, action: Any) -> Stepped:
        """Take a step, and add the mask."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._masked(observation, info), float(reward), terminated, truncated, info

    def _masked(self, observation: Info, info: Info) -> Info:
        space = self.observation_space[keys.ACTION_MASK]
        mask = info.get(keys.ACTION_MASK)
        if mask is None:  # at the end of an episode nothing is chosen any more
            mask = np.ones(space.shape, np.int8)
        parts = [np.asarray(part) for part in mask] if isinstance(mask, (tuple, list)) else [np.asarray(mask)]
        joined = np.concatenate([part.reshape(-1) for part in parts]).astype(np.int8)
        if joined.shape != space.shape:
            raise ValueError(f'info["action_mask"] has {joined.size} entries; the actions have {space.shape[0]}.')
        return {**observation, keys.ACTION_MASK: joined}


def _as_number(value: Any) -> float | None:
    """Return a report of success, which may be an array with one item; None for anything else."""
    is_number = isinstance(value, (bool, int, float, np.generic, np.ndarray)) and np.size(value) == 1
    return float(np.asarray(value).item()) if is_number else None


def _plain_space(space: spaces.Space) -> spaces.Space | None:
    if isinstance(space, (spaces.Tuple, spaces.Dict)):
        parts = {key: _plain_space(part) for key, part in _parts(space).items()}
        kept = {key: part for key, part in parts.items() if part is not None}
        return spaces.Dict(kept) if kept else None
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        return spaces.MultiDiscrete(space.nvec)
    return space if isinstance(space, (spaces.Box, spaces.MultiBinary)) else None


def _plain_value(space: spaces.Space, value: Any) -> Any:
    if isinstance(space, (spaces.Tuple, spaces.Dict)):
        values = value if isinstance(value, dict) else {str(i): part for i, part in enumerate(value)}
        parts = _parts(space).items()
        return {key: _plain_value(part, values[key]) for key, part in parts if _plain_space(part) is not None}
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return value - space.start
    return value


def _parts(space: spaces.Space) -> dict[str, spaces.Space]:
    if isinstance(space, spaces.Dict):
        return dict(space.spaces)
    assert isinstance(space, spaces.Tuple)
    return {str(i): part for i, part in enumerate(space.spaces)}
