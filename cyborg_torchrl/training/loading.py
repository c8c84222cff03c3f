"""Trained agents from checkpoints."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Sequence
from contextlib import closing
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

MAX_NAMED = 3
"""Largest number of runs that an error message names."""


class LoadedAgent(NamedTuple):
    """An agent from a checkpoint."""

    cfg: DictConfig
    """The configuration that it was trained with, with changes."""
    agent: PPOAgent
    content: dict[str, Any]
    """The content of the checkpoint."""


def load_agent(path: Path | str, overrides: Sequence[str] = ()) -> LoadedAgent:
    """Return the agent of a checkpoint, ready to act, and its configuration.

    Args:
        path: a checkpoint, or the folder of a run, for its last checkpoint.
        overrides: changes to the configuration, such as "env.horizon=2000".

    Raises:
        CheckpointError: if the file is not a complete checkpoint, or its parameters are not finite or do not fit its
            configuration.
        ConfigError: if the configuration cannot be used.
    """
    path = checkpoint_path(Path(path))
    loaded = agent_from_content(load_checkpoint(path), path, overrides)
    for name, parameter in loaded.agent.named_parameters():
        if not parameter.isfinite().all():
            raise CheckpointError(f"{path} holds parameters that are no finite numbers ({name}): training diverged.")
    return loaded


def checkpoint_path(path: Path) -> Path:
    """Return the checkpoint of a path: the last one of a run's folder, or the path itself.

    Raises:
        CheckpointError: if it does not exist.
    """
    checkpoint = path / "checkpoints" / "last.pt" if path.is_dir() else path
    if checkpoint.is_file():
        return checkpoint
    runs = sorted(str(last.parent.parent) for last in path.glob("*/checkpoints/last.pt"))
    examples = " or ".join(repr(run) for run in runs[:MAX_NAMED])
    hint = f", such as {examples}" if runs else ""
    raise CheckpointError(f"no checkpoint '{checkpoint}': give a run's folder{hint}, or a file in its 'checkpoints'.")


def config_from_content(content: dict[str, Any], path: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the configuration of a checkpoint, checked, with changes.

    Raises:
        CheckpointError: if the checkpoint has no readable configuration.
        ConfigError: if this version cannot use it.
    """
    config = content.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no configuration.")
    # Runs of older versions have no preset. This one has the defaults of that time.
    config = {"preset": "memory_task", **config}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        try:
            OmegaConf.save(OmegaConf.create(config), file)
        except (OmegaConfBaseException, YAMLError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{path} holds a configuration that cannot be read: {reason}") from None
        return load_config(str(file), overrides)


def agent_from_content(content: dict[str, Any], path: Path, overrides: Sequence[str] = ()) -> LoadedAgent:
    """Return the agent of a checkpoint or a dump. Its parameters may be NaN.

    Raises:
        CheckpointError: if the file has no agent that fits its configuration.
        ConfigError: if the configuration cannot be used.
    """
    device = device_overrides(overrides)
    cfg = config_from_content(content, path, device)
    if overrides:
        cfg = config_from_content(content, path, [*fixed_horizons(cfg), *overrides])
    with closing(build_single_env(cfg)) as env:
        agent = build_agent(cfg, env)
    load_parameters(agent, content, path, [override for override in overrides if override not in device])
    return LoadedAgent(cfg, agent, content)


def device_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that set the device. They come first, since the old device may not exist here."""
    return [override for override in overrides if override.startswith("train.device=")]


def fixed_horizons(cfg: DictConfig) -> list[str]:
    """Return overrides that keep the memory as it was trained when the horizon of the environment changes.

    Time-scales are built from the horizon. They are not parameters, so the checkpoint does not hold them. The window of
    attention may be that of an episode.
    """
    groups = [group for group in ("backbone", "memory") if cfg[group].get("max_horizon", 0) is None]
    has_window = cfg.backbone.get("window", 0) is None
    if not groups and not has_window:
        return []
    cfg = cfg.copy()
    with closing(build_single_env(cfg)) as env:  # fills the options that depend on the environment
        fixed = [f"{group}.max_horizon={memory_horizon(cfg, env)}" for group in groups]
    if has_window and cfg.backbone.window is not None:
        fixed.append(f"backbone.window={cfg.backbone.window}")
    return fixed


def load_parameters(agent: PPOAgent, content: dict[str, Any], path: Path, overrides: Sequence[str] = ()) -> None:
    """Load the parameters of a checkpoint into an agent.

    Args:
        agent: the agent.
        content: the content of the checkpoint.
        path: its file, for messages.
        overrides: changes to the configuration, for messages.

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
        reason = textwrap.shorten(" ".join(str(error).split()), 300)
        raise CheckpointError(f"the parameters in {path} do not fit its configuration: {reason}") from None


def build_single_env(cfg: DictConfig) -> EnvBase:
    """Build one environment, in this process."""
    return build_env(cfg, num_envs=1, workers=0)


def build_acting_env(
    cfg: DictConfig, agent: PPOAgent, *, num_envs: int, seed: int, workers: int | None = None
) -> EnvBase:
    """Build an environment for a trained agent. It adds the agent's memory states; its statistics do not change.

    Args:
        cfg: the agent's configuration.
        agent: the agent.
        num_envs: number of environments.
        seed: seed of the episodes.
        workers: replaces env.workers, where there is such a key.
    """
    env = build_env(cfg, num_envs=num_envs, seed=seed, workers=workers)
    freeze_statistics(env, agent.env_statistics)
    for _, backbone in agent.memories:
        if backbone.state_keys:
            env.append_transform(backbone.make_tensordict_primer())
    return env
