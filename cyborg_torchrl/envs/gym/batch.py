"""A batch of gymnasium environments, in one or several processes, as one TorchRL environment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Composite, MultiCategorical, TensorSpec, Unbounded
from torchrl.envs import EnvBase, GymWrapper
from torchrl.envs.gym_like import BaseInfoDictReader, GymLikeEnv
from torchrl.envs.libs.gym import _gym_to_torchrl_spec_transform

from cyborg_torchrl import keys
from cyborg_torchrl.envs.gym.failures import first_reset

LENGTHS = ("max_episode_steps", "max_episode_length", "episode_length", "max_steps")
"""Attributes of environments that hold the longest episode, in different packages."""

MakeOne = Callable[[], Any]
"""Builder of one gymnasium environment; picklable."""


class GymnasiumEnv(GymWrapper):
    """TorchRL's wrapper around an `EpisodeVectorEnv`.

    There are three differences. Partial resets work on any device. A seed takes effect at the next reset, while TorchRL
    resets all environments at once, although the caller still has their observations. Specs are made from the space of
    one environment, since gymnasium turns a batch of multi-discrete spaces into a box without the sizes.
    """

    def _make_specs(self, env: Any, batch_size: Any = None) -> None:
        super()._make_specs(env, batch_size)
        for name in ("observation", "action"):
            space = getattr(env, f"single_{name}_space")
            spec = _spec_of(space, self.device)
            setattr(self, f"{name}_spec", spec.expand(*self.batch_size, *spec.shape))

    def _reset(self, tensordict: TensorDictBase | None = None, **options: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is not None:
            options["options"] = {"reset_mask": mask.reshape(-1).cpu().numpy()}
        return GymLikeEnv._reset(self, None, **options)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._env.reseed(seed)

    def get_state(self) -> dict[str, Any]:
        """Return the present episodes (see `EpisodeVectorEnv.get_state`)."""
        return self._env.get_state()

    def set_state(self, state: dict[str, Any]) -> Tensor:
        """Restore the episodes. Return the environments that failed, [N] bool."""
        return self._env.set_state(state)


def _spec_of(space: Any, device: torch.device | None) -> TensorSpec:
    """Return the spec of a gymnasium space. TorchRL's would rename entries called "state", and merge equal choices."""
    if hasattr(space, "spaces"):
        return Composite({key: _spec_of(part, device) for key, part in space.spaces.items()}, device=device)
    if hasattr(space, "nvec"):
        return MultiCategorical(space.nvec, device=device)
    return _gym_to_torchrl_spec_transform(space, device=device, categorical_action_encoding=True)


class SuccessReader(BaseInfoDictReader):
    """Reader that writes `info["success"]` of a vector of environments as "success", [N, 1] float.

    gymnasium does not say whether an environment reports success, and some do so only at the end of some episodes. So
    the entry always exists. It is NaN until one of the environments has reported something; from then on a missing
    report counts as no success.

    Args:
        num_envs: N.
        has_reported: the environments are known to report success.
    """

    def __init__(self, num_envs: int, *, has_reported: bool) -> None:
        self.num_envs, self.has_reported = num_envs, has_reported

    def __call__(self, info_dict: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        """Write the entry."""
        reports = info_dict.get(keys.SUCCESS)
        self.has_reported |= reports is not None
        success = torch.full((self.num_envs, 1), 0.0 if self.has_reported else torch.nan)
        if reports is not None:
            success[:, 0] = torch.as_tensor(reports)
        return tensordict.set(keys.SUCCESS, success.to(tensordict.device) if tensordict.device else success)

    @property
    def info_spec(self) -> dict[str, Any]:
        """The spec of the entry."""
        return {keys.SUCCESS: Unbounded((self.num_envs, 1))}


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
    from cyborg_torchrl.envs.gym.episodes import EpisodeVectorEnv

    vector = EpisodeVectorEnv(makers, workers)
    env = GymnasiumEnv(vector, categorical_action_encoding=True, device=device)
    has_reported = bool(vector.metadata.get("reports_success"))
    env.set_info_dict_reader(SuccessReader(num_envs, has_reported=has_reported))
    env.max_episode_steps = longest
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
