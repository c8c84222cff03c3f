"""From configuration to environment."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf
from torchrl.envs import EnvBase

from cyborg_torchrl.config import ConfigError, resolve_device
from cyborg_torchrl.envs.make import tracked
from cyborg_torchrl.envs.transforms.build import build_transforms
from cyborg_torchrl.registry import environments
from cyborg_torchrl.training.builders.options import options_in


def build_env(
    cfg: DictConfig, *, num_envs: int | None = None, seed: int | None = None, workers: int | None = None
) -> EnvBase:
    """Builds the environment of a configuration, batched, with `is_init`, episode returns and its transforms.

    Episode returns are raw: nothing that changes rewards comes before them.

    Args:
        cfg: the configuration.
        num_envs: in place of env.num_envs.
        seed: in place of train.seed.
        workers: in place of env.workers.

    Raises:
        ConfigError: if the environment refuses its options.
    """
    options = options_in(cfg.env)
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
