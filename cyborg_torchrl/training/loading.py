"""Agents from checkpoints."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchrl.envs import EnvBase
from yaml import YAMLError

from cyborg_torchrl.config import load_config
from cyborg_torchrl.envs.transforms.normalization import freeze_statistics
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.training.builders import build_agent, build_env, memory_horizon
from cyborg_torchrl.training.checkpoint import CheckpointError, load_checkpoint

NAMED = 3
"""Runs of a folder that an error names."""


class Restored(NamedTuple):
    """What a checkpoint holds."""

    cfg: DictConfig
    """The configuration that it was trained with."""
    agent: PPOAgent
    content: dict[str, Any]
    """All of the checkpoint."""


def checkpoint_path(path: Path) -> Path:
    """The checkpoint that a path means: itself, or a run folder's last one.

    Raises:
        CheckpointError: if there is none.
    """
    found = path / "checkpoints" / "last.pt" if path.is_dir() else path
    if not found.is_file():
        runs = sorted(str(each.parent.parent) for each in path.glob("*/checkpoints/last.pt"))
        named = f", such as {' or '.join(map(repr, runs[:NAMED]))}" if runs else ""
        raise CheckpointError(f"no checkpoint '{found}': give a run's folder{named}, or a file in its 'checkpoints'.")
    return found


def config_of(content: dict[str, Any], path: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration in a checkpoint, checked as any other, with changes.

    Raises:
        CheckpointError: if there is none.
        ConfigError: if this version cannot use it.
    """
    config = content.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no configuration.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        try:
            OmegaConf.save(OmegaConf.create(config), file)
        except (OmegaConfBaseException, YAMLError) as error:
            said = " ".join(str(error).split())
            raise CheckpointError(f"{path} holds a configuration that cannot be read: {said[:300]}") from None
        return load_config(str(file), overrides)


def load_agent(path: Path | str, overrides: Sequence[str] = ()) -> Restored:
    """The agent of a checkpoint, ready to act, with its configuration.

    Args:
        path: a checkpoint, or a run's folder, which means its last one.
        overrides: changes to the configuration, such as "env.horizon=2000".

    Raises:
        CheckpointError: if it is not a whole checkpoint, its parameters do not fit its configuration, or are no
            numbers.
        ConfigError: if the configuration cannot be used.
    """
    path = checkpoint_path(Path(path))
    cfg, agent, content = agent_of(load_checkpoint(path), path, overrides)
    broken = [name for name, value in agent.named_parameters() if not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(f"{path} holds parameters that are no finite numbers ({broken[0]}): training diverged.")
    return Restored(cfg, agent, content)


def agent_of(content: dict[str, Any], path: Path, overrides: Sequence[str] = ()) -> Restored:
    """The agent in the content of a file, whatever its parameters.

    Raises:
        CheckpointError: if there is none that fits the configuration in it.
        ConfigError: if the configuration cannot be used.
    """
    device = device_overrides(overrides)
    cfg = config_of(content, path, device)
    if overrides:
        cfg = config_of(content, path, [*_pinned_horizons(cfg), *overrides])
    env = build_single_env(cfg)
    try:
        agent = build_agent(cfg, env)
    finally:
        env.close()
    load_parameters(agent, content, path, [override for override in overrides if override not in device])
    return Restored(cfg, agent, content)


def device_overrides(overrides: Sequence[str]) -> list[str]:
    """Those of the changes that say where to compute: the device that was trained on need not be here."""
    return [override for override in overrides if override.startswith("train.device=")]


def build_single_env(cfg: DictConfig) -> EnvBase:
    """One environment of a configuration, in this process."""
    return build_env(cfg, num_envs=1, workers=0 if "workers" in cfg.env else None)


def _pinned_horizons(cfg: DictConfig) -> list[str]:
    """Overrides that leave memory as it was trained, whatever the environment's horizon becomes.

    Time-scales of a read-out are built from the horizon, and are no parameters.
    """
    groups = [group for group in ("backbone", "memory") if cfg[group].get("max_horizon", 0) is None]
    if not groups:
        return []
    env = build_single_env(cfg)
    try:
        return [f"{group}.max_horizon={memory_horizon(cfg, env)}" for group in groups]
    finally:
        env.close()


def load_parameters(agent: PPOAgent, content: dict[str, Any], path: Path, overrides: Sequence[str] = ()) -> None:
    """Gives an agent the parameters of a checkpoint; with the changes to its configuration, of which is told.

    Raises:
        CheckpointError: if they do not fit.
    """
    if "agent" not in content:
        raise CheckpointError(f"{path} holds no agent.")
    try:
        agent.load_state_dict(content["agent"])
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        if overrides:
            raise CheckpointError(
                f"the parameters in {path} do not fit the agent that {' '.join(overrides)} makes of it: change the "
                "environment's options, not the agent's."
            ) from None
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"the parameters in {path} do not fit its configuration: {textwrap.shorten(said, 300)}"
        ) from None


def build_acting_env(
    cfg: DictConfig, agent: PPOAgent, *, num_envs: int, seed: int, workers: int | None = None
) -> EnvBase:
    """An environment for an agent that no longer learns: its memory states are in it, its statistics stay as they are.

    Args:
        cfg: the agent's configuration.
        agent: the agent.
        num_envs: environments side by side.
        seed: seed of the episodes.
        workers: in place of env.workers.
    """
    env = build_env(cfg, num_envs=num_envs, seed=seed, workers=workers)
    freeze_statistics(env, agent.env_statistics)
    if agent.backbone.state_keys:
        env.append_transform(agent.backbone.make_tensordict_primer())
    return env
