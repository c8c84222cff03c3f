"""A batch of gymnasium environments, in one or several processes, as one TorchRL environment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.data import Binary, Composite, MultiCategorical, TensorSpec, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.libs.gym import _gym_to_torchrl_spec_transform

from cyborg_torchrl import keys
from cyborg_torchrl.envs.gym.failures import first_reset

LENGTHS = ("max_episode_steps", "max_episode_length", "episode_length", "max_steps")
"""Attributes of environments that hold the longest episode, in different packages."""

MakeOne = Callable[[], Any]
"""Builder of one gymnasium environment; picklable."""
ENDS = (keys.DONE, keys.TERMINATED, keys.TRUNCATED)


class GymnasiumEnv(EnvBase):
    """A batch of gymnasium environments.

    TorchRL's `GymWrapper` is not used. It resets all environments as soon as it is seeded, although the caller still
    has their observations. Here a seed takes effect at the next reset, partial resets work on any device, and the
    collectors can step on tensors.

    "success", [N, 1] float, is what the environments report as `info["success"]`. gymnasium does not say whether an
    environment reports it, and some do so only at the end of some episodes. So the entry is NaN until one of the
    environments has reported something. From then on a missing report counts as no success.

    `is_prediction` is `metadata["is_prediction"]` of the environments: whether an action is an answer that changes
    nothing that follows. The preset then takes a small discount.

    Args:
        makers: builders of the N environments.
        workers: number of worker processes; 0: all environments in this process.
        max_episode_steps: length of the longest possible episode; None: unknown.
        device: device of all tensors.
    """

    def __init__(
        self,
        makers: Sequence[MakeOne],
        *,
        workers: int = 0,
        max_episode_steps: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        from cyborg_torchrl.envs.gym.episodes import EpisodeBatch

        super().__init__(device=device, batch_size=[len(makers)])
        self.games = EpisodeBatch(makers, workers)
        self.max_episode_steps = max_episode_steps
        self.has_reported = bool(self.games.metadata.get("reports_success"))
        """Whether an environment has reported success."""
        self.is_prediction = bool(self.games.metadata.get("is_prediction"))
        batch, flag = self.batch_size, (len(makers), 1)
        observation = _spec_of(self.games.observation_space, self.device)
        action = _spec_of(self.games.action_space, self.device)
        self._is_dict = isinstance(observation, Composite)
        if not self._is_dict:
            observation = Composite({keys.OBSERVATION: observation}, device=self.device)
        self.observation_spec = observation.expand(*batch, *observation.shape)
        self._leaves = [(unravel_key(key), spec) for key, spec in self.observation_spec.items(True, True)]
        self.observation_spec[keys.SUCCESS] = Unbounded(flag, device=self.device)
        self.action_spec = action.expand(*batch, *action.shape)
        self.reward_spec = Unbounded(flag, device=self.device)
        self.done_spec = Composite(
            {key: Binary(1, flag, dtype=torch.bool, device=self.device) for key in ENDS}, shape=batch
        )

    def advance(self, action: Tensor) -> dict[NestedKey, Tensor]:
        """Take a step, on tensors: the collectors call this instead of `step`.

        Args:
            action: [N, ...].

        Returns:
            The observations, "success", "reward" and the three flags of an end, [N, ...].
        """
        stepped = self.games.step(list(action.detach().cpu().numpy()))
        _, reward, terminated, truncated, infos = zip(*stepped, strict=True)
        reports = [info.get(keys.SUCCESS) for info in infos]
        self.has_reported = self.has_reported or any(report is not None for report in reports)
        entries = self._observed(reports)
        entries[keys.REWARD] = self._column(reward, torch.float32)
        entries[keys.TERMINATED] = self._column(terminated, torch.bool)
        entries[keys.TRUNCATED] = self._column(truncated, torch.bool)
        entries[keys.DONE] = entries[keys.TERMINATED] | entries[keys.TRUNCATED]
        return entries

    def restart(self, is_reset: Tensor | None = None) -> dict[NestedKey, Tensor]:
        """Begin episodes, on tensors.

        Args:
            is_reset: the environments in which an episode begins, [N] bool; None: all.

        Returns:
            The observations and "success" of all environments.
        """
        chosen = range(self.games.num_envs) if is_reset is None else is_reset.nonzero().view(-1).tolist()
        self.games.begin(chosen)
        return self._observed([None] * self.games.num_envs)

    def get_state(self) -> dict[str, Any]:
        """Return the present episodes (see `EpisodeBatch.get_state`)."""
        return self.games.get_state()

    def set_state(self, state: dict[str, Any]) -> Tensor:
        """Restore the episodes. Return the environments that failed, [N] bool."""
        return self.games.set_state(state)

    def close(self, **options: Any) -> None:
        """Close the environments."""
        self.games.close()
        super().close(**options)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        is_reset = None if tensordict is None else tensordict.get("_reset", None)
        entries = self.restart(None if is_reset is None else is_reset.reshape(-1))
        entries |= {key: torch.zeros(*self.batch_size, 1, dtype=torch.bool, device=self.device) for key in ENDS}
        return TensorDict(entries, self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        return TensorDict(self.advance(tensordict.get(keys.ACTION)), self.batch_size, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.games.reseed(seed)

    def _observed(self, reports: Sequence[Any]) -> dict[NestedKey, Tensor]:
        """Return the present observations, and the reports of success."""
        entries: dict[NestedKey, Tensor] = {}
        for key, spec in self._leaves:
            values = self.games.observations
            if self._is_dict:
                for part in (key,) if isinstance(key, str) else key:
                    values = [value[part] for value in values]
            entries[key] = torch.from_numpy(np.stack(values)).to(self.device, spec.dtype).reshape(spec.shape)
        missing = 0.0 if self.has_reported else torch.nan
        entries[keys.SUCCESS] = self._column(
            [missing if report is None else float(report) for report in reports], torch.float32
        )
        return entries

    def _column(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device).unsqueeze(-1)


def _spec_of(space: Any, device: torch.device | None) -> TensorSpec:
    """Return the spec of a gymnasium space. TorchRL's would rename entries called "state", and merge equal choices."""
    if hasattr(space, "spaces"):
        return Composite({key: _spec_of(part, device) for key, part in space.spaces.items()}, device=device)
    if hasattr(space, "nvec"):
        return MultiCategorical(space.nvec, device=device)
    return _gym_to_torchrl_spec_transform(space, device=device, categorical_action_encoding=True)


def batch(
    make: MakeOne | Sequence[MakeOne],
    num_envs: int,
    *,
    workers: int = 0,
    max_episode_steps: int | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> EnvBase:
    """Build one TorchRL environment of batch size [num_envs] from gymnasium environments.

    Its attribute `max_episode_steps` is the length of the longest possible episode; None if unknown.

    Args:
        make: builder of one environment with its wrappers, or one builder for each environment.
        num_envs: N.
        workers: number of worker processes, which are replaced when they die; 0: all environments in this process.
        max_episode_steps: steps of the longest possible episode; None: read it from one environment.
        device: device of all tensors.
        seed: seed from which each environment gets its seed; None: random seeds.

    Raises:
        ValueError: if workers does not divide num_envs.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be >= 1; got {num_envs}.")
    if workers < 0 or (workers and num_envs % workers):
        raise ValueError(f"workers = {workers} must divide num_envs = {num_envs}; 0: all in this process.")
    makers = list(make) if isinstance(make, Sequence) else [make] * num_envs
    longest = longest_episode(makers[0]) if max_episode_steps is None else max_episode_steps
    env = GymnasiumEnv(makers, workers=workers, max_episode_steps=longest, device=device)
    if seed is not None:
        env.set_seed(seed)
    return env


def longest_episode(make: MakeOne) -> int | None:
    """Return the steps of the longest possible episode, in steps of the outermost wrapper; None if unknown.

    Args:
        make: builder of one gymnasium environment, which is closed afterwards.

    Raises:
        ValueError: if it cannot be built.
    """
    env = make()
    try:
        first_reset(env)  # some environments set their length only here
        own = [getattr(env.unwrapped, name, None) for name in LENGTHS]
        limits = [
            limit for limit in (env.spec and env.spec.max_episode_steps, *own) if isinstance(limit, int) and limit > 0
        ]
        skip = env.get_wrapper_attr("frames") if env.has_wrapper_attr("frames") else 1
        return math.ceil(min(limits) / skip) if limits else None
    finally:
        env.close()
