"""Build the environment of a configuration."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchrl.envs import EnvBase

from cyborg_torchrl.config import ConfigError, resolve_device
from cyborg_torchrl.envs.make import tracked
from cyborg_torchrl.envs.transforms.build import build_transforms
from cyborg_torchrl.registry import environments


def builder_options(node: DictConfig) -> dict[str, Any]:
    """Return the keyword arguments of a registered builder, from its part of a configuration."""
    return {str(key): value for key, value in OmegaConf.to_container(node).items() if key != "name"}


def build_env(
    cfg: DictConfig, *, num_envs: int | None = None, seed: int | None = None, workers: int | None = None
) -> EnvBase:
    """Build the batched environment of a configuration, with `is_init`, episode returns and its transforms.

    Episode returns are raw: transforms that change rewards come after them.

    Args:
        cfg: the configuration.
        num_envs: replaces env.num_envs.
        seed: replaces train.seed.
        workers: replaces env.workers.

    Raises:
        ConfigError: if the environment refuses its options.
    """
    options = builder_options(cfg.env)
    options["num_envs"] = options.get("num_envs", 1) if num_envs is None else num_envs
    if workers is not None:
        options["workers"] = workers
    seed = cfg.train.seed if seed is None else seed
    try:
        env = environments.get(cfg.env.name)(**options, device=resolve_device(cfg.train.device), seed=seed)
    except ValueError as error:
        raise ConfigError(f"env: {error}") from None
    try:
        transforms = build_transforms(env, gamma=cfg.train.gamma, **OmegaConf.to_container(cfg.transforms))
    except ValueError as error:
        raise ConfigError(f"transforms: {error}") from None
    return tracked(env, transforms)
