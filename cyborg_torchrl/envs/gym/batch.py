"""Gymnasium environments side by side, in this process or in several, as one TorchRL environment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Binary, MultiCategorical
from torchrl.envs import EnvBase, GymWrapper
from torchrl.envs.gym_like import BaseInfoDictReader, GymLikeEnv
from torchrl.envs.libs.gym import _gym_to_torchrl_spec_transform

from cyborg_torchrl import keys

LENGTHS = ("max_episode_steps", "max_episode_length", "episode_length", "max_steps")
"""What packages call the longest an episode can last."""

MakeOne = Callable[[], Any]
"""Makes one gymnasium environment; picklable."""


class GymnasiumEnv(GymWrapper):
    """TorchRL's wrapper around a `EpisodeVectorEnv`.

    Differs from it in three things. It resets what it is told to on any device. Seeding waits for the next reset;
    TorchRL's resets all environments at once, behind the back of whoever holds their observations. Specs are made from
    the space of one environment: gymnasium turns a batch of multi-discrete spaces into a box, without the sizes.
    """

    def _make_specs(self, env: Any, batch_size: Any = None) -> None:
        super()._make_specs(env, batch_size)
        for name in ("observation", "action"):
            space = getattr(env, f"single_{name}_space")
            spec = _gym_to_torchrl_spec_transform(space, device=self.device, categorical_action_encoding=True)
            if hasattr(space, "nvec"):  # choices of equal size are made one categorical of several entries
                spec = MultiCategorical(space.nvec, device=self.device)
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
        """What the environments are in the middle of (see `EpisodeVectorEnv.get_state`)."""
        return self._env.get_state()

    def set_state(self, state: dict[str, Any]) -> Tensor:
        """Goes back there. Returns which environments could not, [N] bool."""
        return self._env.set_state(state)


class SuccessReader(BaseInfoDictReader):
    """Writes `info["success"]` of a vector of environments as "success", [N, 1] bool.

    Args:
        num_envs: N.
    """

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs

    def __call__(self, info_dict: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        """Reads; what was not reported is no success."""
        success = torch.zeros(self.num_envs, 1, dtype=torch.bool)
        if "success" in info_dict:
            success[:, 0] = torch.as_tensor(info_dict["success"].astype(bool))
        return tensordict.set(keys.SUCCESS, success.to(tensordict.device) if tensordict.device else success)

    @property
    def info_spec(self) -> dict[str, Any]:
        """What is written."""
        return {keys.SUCCESS: Binary(1, (self.num_envs, 1), dtype=torch.bool)}


def batch(
    make: MakeOne | Sequence[MakeOne],
    num_envs: int,
    *,
    workers: int = 0,
    max_episode_steps: int | None = None,
    reports_success: bool = False,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> EnvBase:
    """Puts gymnasium environments side by side as one TorchRL environment of batch size [num_envs].

    Its attribute `max_episode_steps` is the longest that an episode can last, None if that is unknown.

    Args:
        make: makes one, with its wrappers; or one callable for each.
        num_envs: N.
        workers: processes that the environments are split over, replaced when they die; 0: all in this process.
        max_episode_steps: the longest that an episode can last; None: one is made, and asked.
        reports_success: there is an `info["success"]`, read as "success".
        device: where tensors are put.
        seed: seed of all environments, each gets its own from it; None: whatever.

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

    env = GymnasiumEnv(EpisodeVectorEnv(makers, workers), categorical_action_encoding=True, device=device)
    if reports_success:
        env.set_info_dict_reader(SuccessReader(num_envs))
    env.max_episode_steps = longest
    if seed is not None:
        env.set_seed(seed)
    return env


def longest_episode(make: MakeOne) -> int | None:
    """The most steps that an episode can last, in steps of the outermost wrapper; None if that is unknown.

    Args:
        make: makes one gymnasium environment, which is closed again.

    Raises:
        ValueError: if it cannot be made.
    """
    env = make()
    try:
        env.reset(seed=0)  # some know their length only then
        own = [getattr(env.unwrapped, name, None) for name in LENGTHS]
        limits = [
            limit for limit in (env.spec and env.spec.max_episode_steps, *own) if isinstance(limit, int) and limit > 0
        ]
        skip = env.get_wrapper_attr("frames") if env.has_wrapper_attr("frames") else 1
        return math.ceil(min(limits) / skip) if limits else None
    finally:
        env.close()
