# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (tensordict's and torchrl's annotations are narrower than what they take)
"""Gymnasium environments side by side, in this process or in several, as one TorchRL environment."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import Binary, MultiCategorical
from torchrl.envs import EnvBase, GymWrapper, ParallelEnv
from torchrl.envs.gym_like import BaseInfoDictReader, GymLikeEnv
from torchrl.envs.libs.gym import _gym_to_torchrl_spec_transform

from cyborg_torchrl import keys

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
        # processes that nobody ended would hold up the interpreter's end for minutes
        weakref.finalize(self, _close, env)
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


def _close(env: EnvBase) -> None:
    if not env.is_closed:
        with contextlib.suppress(RuntimeError, OSError):  # of processes that are gone already
            env.close()


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
        workers: processes that the environments are split over; 0: all in this process.
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
    if workers:
        share = num_envs // workers
        parts = [partial(_vector, makers[i * share : (i + 1) * share], reports_success) for i in range(workers)]
        env: EnvBase = FlatBatch(ParallelEnv(workers, parts, device=device))
    else:
        env = _vector(makers, reports_success, device)
    env.max_episode_steps = longest
    if seed is not None:
        env.set_seed(seed)
    return env


def _vector(makers: Sequence[MakeOne], reports_success: bool, device: torch.device | str | None = None) -> GymnasiumEnv:
    from cyborg_torchrl.envs.gymnasium_vector import SeededVectorEnv

    if multiprocessing.parent_process() is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that collects, which ends this one
    env = GymnasiumEnv(SeededVectorEnv(makers), categorical_action_encoding=True, device=device)
    if reports_success:
        env.set_info_dict_reader(SuccessReader(len(makers)))
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
