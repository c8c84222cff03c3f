"""One step of an environment and its transforms on tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.data import Composite, NonTensor
from torchrl.envs import EnvBase, InitTracker, RewardClipping, RewardSum, TensorDictPrimer, Transform, TransformedEnv

from cyborg_torchrl import keys
from cyborg_torchrl.collectors.flat_dict import FlatDict, NotFusable, flat
from cyborg_torchrl.envs.gym.batch import GymnasiumEnv
from cyborg_torchrl.envs.memory.task import MemoryTask
from cyborg_torchrl.envs.popgym.base import PopgymEnv
from cyborg_torchrl.envs.transforms.entries import EntryTransform

Step = tuple[FlatDict, FlatDict, Tensor | None]
"""FlatDict after a step, entries before the next step, and a mask of beginning episodes; None: none begins."""


class FusedEnv:
    """An environment and its transforms as one step on entries.

    Args:
        env: a `MemoryTask`, a `PopgymEnv` or a `GymnasiumEnv` behind any of TorchRL's InitTracker, RewardSum,
            RewardClipping and TensorDictPrimer, and our transforms.

    Raises:
        NotFusable: if the environment or a transform is another one.
    """

    def __init__(self, env: EnvBase) -> None:
        transforms, base = _unwrapped(env)
        self.is_ever_cut = not isinstance(base, MemoryTask)
        self.never = torch.zeros(*base.batch_size, 1, dtype=torch.bool, device=base.device)
        self._advance, self._restart = _functions(base, self.never)
        self.defaults: FlatDict = {}
        """Values of entries at an episode's first step: sums of rewards, memory states."""
        self.init_keys: list[NestedKey] = []
        """Flags of an episode's first step: one for each InitTracker."""
        self._after_step: list[Callable[[FlatDict, FlatDict], None]] = []
        """Calls on the entries before and after a step."""
        self._after_reset: list[Callable[[FlatDict, Tensor], None]] = []
        # Exact types, since a subclass may do something else.
        for transform in transforms:
            if type(transform) is InitTracker:
                self.init_keys += map(unravel_key, transform.init_keys)
            elif type(transform) is RewardSum and list(transform.in_keys) == [keys.REWARD]:
                self._after_step.append(self._sum(unravel_key(transform.out_keys[0])))
            elif type(transform) is RewardClipping:
                self._after_step.append(_clip(transform))
            elif isinstance(transform, EntryTransform) and not _overrides(transform, EntryTransform):
                self._after_step.append(transform.after_step)
                self._after_reset.append(transform.after_reset)
            elif type(transform) is TensorDictPrimer and not transform.random:
                self.defaults |= _defaults(transform, base)
            else:
                raise NotFusable(f"the environment has a {type(transform).__name__}")
        self._next_keys = {key: unravel_key((keys.NEXT, key)) for key in self.defaults}
        # Our transforms may have numbers that a graph would not change.
        has_transforms = any(isinstance(transform, EntryTransform) for transform in transforms)
        self.task = base if isinstance(base, MemoryTask) and not has_transforms else None
        """The task whose steps a CUDA graph can compute; None if there is none."""

    def step(self, carried: FlatDict, written: FlatDict) -> Step:
        """Take a step.

        Args:
            carried: the entries before the step.
            written: the entries of the policy.

        Returns:
            The entries after the step ("next" in a tensordict), the entries before the next step, and a mask of
            episodes that begin there, [N, 1].
        """
        after = self.advance(carried, written)
        # Most steps end no episode, so the common case needs no reset.
        return self.restart(after) if bool(after[keys.DONE].any()) else (after, self.following(after), None)

    def advance(self, carried: FlatDict, written: FlatDict) -> FlatDict:
        """Return the entries after a step, as `step` does, without a reset."""
        before = {**carried, **written, **_finite(written)}
        after = self._advance(before[keys.ACTION])
        # Only the first step of an episode is marked, and "next" is never a first step.
        for key in self.init_keys:
            after[key] = self.never
        for call in self._after_step:
            call(before, after)
        # Entries that were not written in this step keep their values.
        for key, next_key in self._next_keys.items():
            if key not in after:
                after[key] = written.get(next_key, carried[key])
        return after

    def following(self, after: FlatDict) -> FlatDict:
        """Return the entries before the next step, where no episode begins."""
        # The next step begins with the same tensors; the reward belongs to "next" only.
        begins = dict(after)
        del begins[keys.REWARD]
        return begins

    def restart(self, after: FlatDict) -> Step:
        """Begin new episodes where they are over, and return what `step` does."""
        begins, is_over = self.following(after), after[keys.DONE]
        fresh = self._restart(is_over.squeeze(-1))
        for begin in self._after_reset:
            begin(fresh, is_over)
        for key, value in (*fresh.items(), *self.defaults.items()):
            begins[key] = torch.where(is_over.view(-1, *(1,) * (value.ndim - 1)), value, after[key])
        begins[keys.DONE] = begins[keys.TERMINATED] = begins[keys.TRUNCATED] = self.never
        for key in self.init_keys:
            begins[key] = is_over
        return after, begins, is_over

    def _sum(self, key: NestedKey) -> Callable[[FlatDict, FlatDict], None]:
        self.defaults[key] = torch.zeros(self.never.shape, device=self.never.device)

        def call(before: FlatDict, after: FlatDict) -> None:
            after[key] = before[key] + after[keys.REWARD]

        return call


def _clip(transform: RewardClipping) -> Callable[[FlatDict, FlatDict], None]:
    low, high = transform.clamp_min, transform.clamp_max

    def call(_: FlatDict, after: FlatDict) -> None:
        after[keys.REWARD] = after[keys.REWARD].clamp(low, high)

    return call


def _functions(env: EnvBase, never: Tensor) -> tuple[Callable[[Tensor], FlatDict], Callable[[Tensor], FlatDict]]:
    """Return a step and a reset of an environment, without its transforms: they return entries of all environments."""
    known = next((kind for kind in (MemoryTask, PopgymEnv, GymnasiumEnv) if isinstance(env, kind)), None)
    if known is None:
        raise NotFusable(f"{type(env).__name__} is not one of the package's environments")
    if name := _overrides(env, known):  # `advance` and `restart` are called instead of them
        raise NotFusable(f"{type(env).__name__} has another {name}")
    if not isinstance(env, MemoryTask):
        return env.advance, env.restart

    def advance(action: Tensor) -> FlatDict:
        observation, success, reward, terminated = env.advance(action)
        return {
            keys.OBSERVATION: observation,
            keys.SUCCESS: success,
            keys.REWARD: reward,
            keys.DONE: terminated,
            keys.TERMINATED: terminated,
            keys.TRUNCATED: never,
        }

    def restart(is_over: Tensor) -> FlatDict:
        observation, success = env.restart(is_over)
        return {keys.OBSERVATION: observation, keys.SUCCESS: success}

    return advance, restart


def _overrides(value: object, known: type) -> str:
    """Return the first of `_step` and `_reset` that is not that of a known class; "" if there is none."""
    return next((name for name in ("_step", "_reset") if getattr(type(value), name) is not getattr(known, name)), "")


def _unwrapped(env: EnvBase) -> tuple[list[Transform], EnvBase]:
    """Return the transforms around an environment, innermost first, and the environment itself."""
    transforms: list[Transform] = []
    while isinstance(env, TransformedEnv):
        transform = env.transform
        parts = list(getattr(transform, "transforms", [transform])) if transform is not None else []
        transforms = [*parts, *transforms]
        env = env.base_env
    return transforms, env


def _defaults(primer: TensorDictPrimer, env: EnvBase) -> FlatDict:
    values, primers = primer.default_value, cast("Composite", primer.primers)
    found: FlatDict = {}
    for key, spec in primers.items(True, True):
        key = unravel_key(key)
        value = values.get(key, None) if isinstance(values, Mapping) else values
        if not isinstance(value, (int, float)) or spec.shape[:1] != env.batch_size:
            raise NotFusable("the environment's primer has other values than numbers")
        found[key] = torch.full(spec.shape, value, dtype=spec.dtype, device=env.device)
    return found


class OpaqueEnv:
    """Any other environment with one batch dimension; its step is TorchRL's, between flat dictionaries.

    Args:
        env: the environment with all its transforms.

    Raises:
        NotFusable: if it has another number of batch dimensions, or entries that are not tensors.
    """

    def __init__(self, env: EnvBase) -> None:
        if len(env.batch_size) != 1:
            raise NotFusable(f"the environment has the batch size {list(env.batch_size)}")
        if any(isinstance(spec, NonTensor) for spec in env.observation_spec.values(True, True)):
            raise NotFusable("the environment has entries that are no tensors")
        self.env = env
        self.is_ever_cut = True

    def step(self, carried: FlatDict, written: FlatDict) -> Step:
        """Take a step, as `FusedEnv.step` does."""
        # TorchRL steps a tensordict, so the entries are packed here and unpacked below.
        played = TensorDict({**carried, **written, **_finite(written)}, self.env.batch_size, device=self.env.device)
        played, begins = self.env.step_and_maybe_reset(played)
        after = flat(played.get(keys.NEXT))
        is_over = after[keys.DONE]
        return after, flat(begins), is_over if bool(is_over.any()) else None


def _finite(written: FlatDict) -> FlatDict:
    """Return a continuous action with zeros for NaN and infinity, for the environment only; {} for other actions.

    The recorded action does not change. The check of the whole rollout names the entry, the environment and the step,
    and until then the environment must not fail because of the action.
    """
    action = written.get(keys.ACTION)
    is_continuous = action is not None and action.is_floating_point()
    return {keys.ACTION: action.nan_to_num(0.0, 0.0, 0.0)} if is_continuous else {}


EnvStep = FusedEnv | OpaqueEnv
"""Both have the same interface."""


def env_step(env: EnvBase) -> tuple[EnvStep, str]:
    """Return the stepper of an environment, and the reason if TorchRL steps it, else "".

    Raises:
        NotFusable: if neither stepper fits.
    """
    try:
        return FusedEnv(env), ""
    except NotFusable as reason:
        return OpaqueEnv(env), str(reason)
