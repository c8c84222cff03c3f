"""Wrappers of one gymnasium environment. Needs gymnasium."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

from cyborg_torchrl import keys
from cyborg_torchrl.modules.encoders.images import is_picture

LOGGER = logging.getLogger(__name__)
MAX_CHOICES = 256
"""Most values of an integer action that is treated as a choice."""
UNSIGNED = {np.uint16: np.int64, np.uint32: np.int64, np.uint64: np.float32}
"""Types that TorchRL has no spec for, and what they become."""
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
    """Action spaces that have a policy, with one dimension. Discrete actions start at 0, continuous ones are clipped.

    Gymnasium's `ClipAction` would make the bounds infinite.

    | space | becomes |
    |---|---|
    | Discrete, MultiDiscrete of any shape | the same, flat and from 0; one choice becomes Discrete |
    | MultiBinary, Box of integers or booleans with at most 256 values | MultiDiscrete |
    | Box of floats, of any shape | Box of one dimension |

    Raises:
        ValueError: if no policy has such actions.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.inner = env.action_space
        space = _plain_actions(self.inner)
        if space is None:
            raise ValueError(
                f"there is no policy for actions in {' '.join(str(self.inner).split())}: convert it in a "
                "gymnasium.ActionWrapper to Discrete, MultiDiscrete, MultiBinary, or a Box that is not empty."
            )
        self.action_space = space
        is_box = isinstance(self.inner, spaces.Box)
        self.start: Any = self.inner.low if is_box else getattr(self.inner, "start", 0)

    def action(self, action: Any) -> Any:
        """Return the action that the environment takes."""
        space = self.action_space
        if isinstance(self.inner, spaces.Discrete):
            return action + self.start
        if isinstance(space, spaces.Box):
            action = np.clip(action, space.low, space.high)
            return action.reshape(self.inner.shape).astype(self.inner.dtype)
        return (np.reshape(action, self.inner.shape) + self.start).astype(self.inner.dtype)


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

    Tuples become dictionaries ("0", "1", ...). Discrete spaces start at 0, and several choices are flat. Unsigned
    integers of two bytes or more, which TorchRL does not know, become int64, those of eight bytes float32. Texts and
    empty arrays are dropped, and so are graphs, sequences and alternatives, with a warning. The result has the key
    "pixels" if it is one picture, else "observation".
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        reading = _reading(env.observation_space)
        if reading is None:
            text = " ".join(str(env.observation_space).split())
            raise ValueError(
                f"nothing of the observation space {text} can be read: convert it in a gymnasium.ObservationWrapper to "
                "Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of them."
            )
        space, self._convert = reading
        is_image = isinstance(space, spaces.Box) and is_picture(space.shape)
        self.key = "pixels" if is_image else "observation"
        self.observation_space = spaces.Dict({self.key: space})

    def observation(self, observation: Any) -> Info:
        """Convert an observation."""
        return {self.key: self._convert(observation)}


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


class _Reading(NamedTuple):
    """The plain space of an observation, and the function that converts an observation."""

    space: spaces.Space
    convert: Callable[[Any], Any]


def _reading(space: spaces.Space) -> _Reading | None:
    """Return how a space is read; None if nothing of it can be read."""
    if isinstance(space, (spaces.Tuple, spaces.Dict)):
        return _reading_of_parts(_parts(space))
    if isinstance(space, spaces.Discrete):
        return _Reading(spaces.Discrete(int(space.n)), lambda value: value - space.start)
    if not isinstance(space, (spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary)) or 0 in space.shape:
        return None
    if isinstance(space, spaces.MultiDiscrete):
        return _Reading(spaces.MultiDiscrete(space.nvec.reshape(-1)), lambda value: np.reshape(value - space.start, -1))
    if isinstance(space, spaces.MultiBinary):
        return _Reading(spaces.MultiBinary(math.prod(space.shape)), lambda value: np.reshape(value, -1))
    kind = UNSIGNED.get(space.dtype.type)
    if kind is None:
        return _Reading(space, lambda value: value)
    plain = spaces.Box(space.low.astype(kind), space.high.astype(kind), dtype=kind)
    return _Reading(plain, lambda value: np.asarray(value).astype(kind))


def _reading_of_parts(parts: dict[str, spaces.Space]) -> _Reading | None:
    readings: dict[str, _Reading] = {}
    for key, part in parts.items():
        reading = _reading(part)
        if reading is None:
            _warn_about_dropped(key, " ".join(str(part).split()))
        else:
            readings[key] = reading

    def convert(value: Any) -> Any:
        values = value if isinstance(value, dict) else {str(i): part for i, part in enumerate(value)}
        return {key: reading.convert(values[key]) for key, reading in readings.items()}

    plain = {key: reading.space for key, reading in readings.items()}
    return _Reading(spaces.Dict(plain), convert) if readings else None


@functools.cache
def _warn_about_dropped(key: str, space: str) -> None:
    """Warn once about a part of the observation that is not read; texts are instructions for people."""
    if not space.startswith("Text"):
        LOGGER.warning("the observation '%s' in %s is not read: no encoder reads such a space.", key, space)


def _plain_actions(space: spaces.Space) -> spaces.Space | None:
    """Return the action space with one dimension that a policy has; None if there is none."""
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(int(space.n))
    if space.shape is None or 0 in space.shape:
        return None
    if isinstance(space, spaces.MultiDiscrete):
        return _choices(space.nvec.reshape(-1))
    if isinstance(space, spaces.MultiBinary):
        return _choices(np.full(math.prod(space.shape), 2))
    if not isinstance(space, spaces.Box):
        return None
    low, high = space.low.reshape(-1), space.high.reshape(-1)
    if space.dtype.kind == "f":
        kind = np.float64 if space.dtype == np.float64 else np.float32
        return spaces.Box(low.astype(kind), high.astype(kind), dtype=kind)
    sizes = high.astype(np.float64) - low.astype(np.float64) + 1
    return _choices(sizes.astype(np.int64)) if sizes.max() <= MAX_CHOICES else None


def _choices(sizes: np.ndarray) -> spaces.Space:
    """Return the space of several choices; TorchRL fails on a MultiDiscrete of one."""
    return spaces.Discrete(int(sizes[0])) if len(sizes) == 1 else spaces.MultiDiscrete(sizes)


def _parts(space: spaces.Space) -> dict[str, spaces.Space]:
    if isinstance(space, spaces.Dict):
        return dict(space.spaces)
    assert isinstance(space, spaces.Tuple)
    return {str(i): part for i, part in enumerate(space.spaces)}
