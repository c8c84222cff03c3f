# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (tensordict's and torchrl's annotations are narrower than what they take)
"""`gymnasium`: any registered gymnasium environment by its id, and what the other adapters share."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import Binary, MultiCategorical
from torchrl.envs import EnvBase, GymWrapper, ParallelEnv
from torchrl.envs.gym_like import BaseInfoDictReader, GymLikeEnv
from torchrl.envs.libs.gym import _gym_to_torchrl_spec_transform

from cyborg_torchrl import keys
from cyborg_torchrl.registry import register_environment

EXTRA = "pip install 'cyborg-torchrl[envs]'"
LENGTHS = ("max_episode_steps", "max_episode_length", "episode_length", "max_steps")
"""What packages call the longest an episode can last."""

MakeOne = Callable[[], Any]
"""Makes one gymnasium environment; picklable."""


class GymnasiumEnv(GymWrapper):
    """TorchRL's wrapper around a `SeededVectorEnv`.

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


class FlatBatch(EnvBase):
    """An environment of batch size [W, n] as one of batch size [W n].

    (TorchRL's `BatchSizeTransform` cannot stand before transforms that know the batch size, such as `RewardSum`.)

    Args:
        env: the environment, with two batch dimensions.
    """

    def __init__(self, env: EnvBase) -> None:
        super().__init__(device=env.device, batch_size=[env.batch_size.numel()])
        self.inner = env
        self.observation_spec = env.observation_spec.flatten(0, 1)
        self.action_spec = env.action_spec.flatten(0, 1)
        self.reward_spec = env.reward_spec.flatten(0, 1)
        self.done_spec = env.full_done_spec.flatten(0, 1)

    def close(self, **options: Any) -> None:
        """Ends the worker processes."""
        super().close(**options)
        if not self.inner.is_closed:
            self.inner.close(**options)

    def _reset(self, tensordict: TensorDictBase | None = None, **options: Any) -> TensorDictBase:
        inner = None if tensordict is None else tensordict.reshape(self.inner.batch_size)
        return self.inner._reset(inner, **options).flatten(0, 1)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self.inner._step(tensordict.reshape(self.inner.batch_size)).flatten(0, 1)

    def _set_seed(self, seed: int | None) -> None:
        self.inner.set_seed(seed)


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


def import_package(name: str, *, command: str = EXTRA) -> ModuleType:
    """Imports an optional package.

    Raises:
        ValueError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"the package '{name}' cannot be imported ({error}): {command}") from None


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """One line for an id that does not exist, with the nearest that do."""
    names = sorted(known)
    folded = {other.lower(): other for other in names}
    near = [folded[other] for other in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)]
    some = ", ".join(f"'{other}'" for other in near) or ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"no {what} '{name}': {'did you mean ' if near else 'there are '}{some}{'?' if near else ''}"


def batch(
    make: MakeOne,
    num_envs: int,
    *,
    workers: int = 0,
    reports_success: bool = False,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> EnvBase:
    """Puts gymnasium environments side by side as one TorchRL environment of batch size [num_envs].

    Its attribute `max_episode_steps` is the longest that an episode can last, None if that is unknown.

    Args:
        make: makes one, with its wrappers.
        num_envs: N.
        workers: processes that the environments are split over; 0: all in this process.
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
    longest = longest_episode(make)
    build = partial(_vector, make, num_envs // max(workers, 1), reports_success)
    if workers:
        env: EnvBase = FlatBatch(ParallelEnv(workers, build, device=device))
    else:
        env = build(device=device)
    env.max_episode_steps = longest
    if seed is not None:
        env.set_seed(seed)
    return env


def _vector(
    make: MakeOne, num_envs: int, reports_success: bool, device: torch.device | str | None = None
) -> GymnasiumEnv:
    from cyborg_torchrl.envs.gymnasium_vector import SeededVectorEnv

    env = GymnasiumEnv(SeededVectorEnv([make] * num_envs), categorical_action_encoding=True, device=device)
    return env.set_info_dict_reader(SuccessReader(num_envs)) if reports_success else env


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


def wrap(env: Any, *, frame_skip: int = 1, **reported: Any) -> Any:
    """Puts the usual wrappers around one gymnasium environment.

    Args:
        env: the environment.
        frame_skip: steps of it for each action.
        reported: how it reports success and its time limit, and its reset options, for `Reported`.

    Raises:
        ValueError: if frame_skip is below 1 or nothing of the observations can be read.
    """
    from gymnasium import spaces

    from cyborg_torchrl.envs.gymnasium_vector import ClipToBounds, FrameSkip, Plain, Reported

    if frame_skip < 1:
        raise ValueError(f"frame_skip must be >= 1; got {frame_skip}.")
    if isinstance(env.action_space, spaces.Box):
        env = ClipToBounds(env)
    if reported:
        env = Reported(env, **reported)
    if frame_skip > 1:
        env = FrameSkip(env, frame_skip)
    return Plain(env)


def make_registered(env_id: str, max_episode_steps: int | None = None, options: dict[str, Any] | None = None) -> Any:
    """`gymnasium.make` with errors in one line.

    Raises:
        ValueError: if there is no such id, the environment refuses its options, or a package that it needs is missing.
    """
    gymnasium = import_package("gymnasium")
    if max_episode_steps is not None and max_episode_steps < 1:
        raise ValueError(f"max_episode_steps must be >= 1; got {max_episode_steps}.")
    try:
        return gymnasium.make(env_id, max_episode_steps=max_episode_steps, disable_env_checker=True, **options or {})
    except gymnasium.error.UnregisteredEnv:
        raise ValueError(nearest(env_id, gymnasium.registry, "gymnasium id")) from None
    except (gymnasium.error.Error, TypeError, ImportError) as error:
        given = f" with options {options}" if options else ""
        raise ValueError(f"'{env_id}'{given}: {' '.join(str(error).split())}") from None


def _make(env_id: str, frame_skip: int, max_episode_steps: int | None, options: dict[str, Any] | None) -> Any:
    return wrap(make_registered(env_id, max_episode_steps, options), frame_skip=frame_skip)


@register_environment("gymnasium")
def build_gymnasium(
    *,
    id: str = "CartPole-v1",
    num_envs: int = 16,
    frame_skip: int = 1,
    max_episode_steps: int | None = None,
    workers: int = 0,
    options: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> EnvBase:
    """Any registered gymnasium environment.

    Args:
        id: its id, "module:Name-v0" to import a module first.
        num_envs: environments side by side.
        frame_skip: steps of it for each action; rewards are summed.
        max_episode_steps: truncates after so many of its own steps; None: as it was registered.
        workers: processes that the environments are split over; 0: all in this process.
        options: keyword arguments of `gymnasium.make`.
        device: where tensors are put.
        seed: environment i gets its own seed from this one.

    Raises:
        ValueError: in one line, if the id does not exist or an option cannot be used.
    """
    make = partial(_make, id, frame_skip, max_episode_steps, options)
    return batch(make, num_envs, workers=workers, device=device, seed=seed)
