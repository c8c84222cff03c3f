"""Registered environments by name, for scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchrl.envs import Compose, EnvBase, InitTracker, RewardSum, Transform, TransformedEnv

from cyborg_torchrl.envs.transforms.build import build_transforms
from cyborg_torchrl.registry import did_you_mean, environments, options_of


def make_env(
    name: str,
    *,
    device: torch.device | str | None = None,
    seed: int | None = None,
    transforms: Mapping[str, Any] | None = None,
    gamma: float = 0.99,
    **options: Any,
) -> TransformedEnv:
    """Build a registered environment, batched, with `is_init` and episode returns, ready for a collector.

    Args:
        name: as in `env=<name>`.
        device: device of the environment.
        seed: seed of the episodes.
        transforms: transforms with their values, as in `transforms.previous_action=true`.
        gamma: discount, for `transforms={"normalize_reward": True}`.
        **options: options of the environment: `num_envs`, `horizon`, `level`, `id`, ...

    Raises:
        ValueError: if the name or an option is unknown; the message names the nearest one. Also if the environment or a
            transform rejects a value.

    Examples:
        >>> make_env("delayed_cue", num_envs=8, horizon=20, seed=0).reset()["observation"].shape
        torch.Size([8, 6])
    """
    builder = environments.get(name)
    known = options_of(builder)
    for option in options:
        if option not in known:
            raise ValueError(f"environment '{name}' has no option '{option}': {did_you_mean(option, known)}")
    known = set(options_of(build_transforms)) - {"env", "gamma"}
    for option in transforms or {}:
        if option not in known:
            raise ValueError(f"no transform '{option}': {did_you_mean(option, known)}")
    env = builder(**options, device=device, seed=seed)
    return tracked(env, build_transforms(env, gamma=gamma, **(transforms or {})))


def tracked(env: EnvBase, transforms: Sequence[Transform] = ()) -> TransformedEnv:
    """Return the environment with `is_init`, episode returns and transforms. Returns are of untransformed rewards."""
    return TransformedEnv(env, Compose(InitTracker(), RewardSum(), *transforms), auto_unwrap=True)


def episode_attribute(env: EnvBase | None, name: str) -> int | None:
    """Return a number such as `max_episode_steps` of an environment; None if it has none, or its parts differ."""
    while env is not None:
        try:
            value = getattr(env, name, None)
        except RecursionError:  # of TorchRL batches that are not running
            return None
        values = (
            set(value) if isinstance(value, (list, tuple)) else {value}
        )  # a batched environment returns one value for each part
        if len(values) == 1 and isinstance(found := values.pop(), int):
            return found
        env = getattr(env, "base_env", None)
    return None
