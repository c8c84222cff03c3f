"""Registered environments by their names, for scripts."""

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
    """Makes a registered environment, batched, with `is_init` and episode returns: ready for a collector.

    Args:
        name: as in `env=<name>`.
        device: where it runs.
        seed: seed of its episodes.
        transforms: what stands between it and the agent, as in `transforms.previous_action=true`.
        gamma: discount, for `transforms={"normalize_reward": True}`.
        options: those of the environment: `num_envs`, `horizon`, `level`, `id`, ...

    Raises:
        ValueError: if there is no such environment, or no such option, with the nearest that there is; or if the
            environment or a transform refuses an option.

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
    """An environment with `is_init` and episode returns, which are raw: nothing that changes rewards comes before."""
    return TransformedEnv(env, Compose(InitTracker(), RewardSum(), *transforms), auto_unwrap=True)


def episode_attribute(env: EnvBase | None, name: str) -> int | None:
    """`horizon` or `max_episode_steps` of an environment; None if it has none, or its parts have different ones."""
    while env is not None:
        try:
            value = getattr(env, name, None)
        except RecursionError:  # TorchRL's batches of environments that are not started, or closed
            return None
        values = set(value) if isinstance(value, (list, tuple)) else {value}  # a batch answers for each
        if len(values) == 1 and isinstance(found := values.pop(), int):
            return found
        env = getattr(env, "base_env", None)
    return None
