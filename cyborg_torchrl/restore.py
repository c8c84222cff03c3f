# pyright: basic, reportArgumentType=false
# (torch's annotations are narrower than what it takes)
"""Agents from checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from cyborg_torchrl.build import build_agent, build_env
from cyborg_torchrl.checkpoint import CheckpointError, load_checkpoint
from cyborg_torchrl.config import load_config
from cyborg_torchrl.modules import PPOAgent


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
        raise CheckpointError(f"no checkpoint '{found}': give a run's folder, or a file in its 'checkpoints'.")
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
        OmegaConf.save(OmegaConf.create(config), file)
        return load_config(str(file), overrides)


def load_agent(path: Path | str, overrides: Sequence[str] = ()) -> Restored:
    """The agent of a checkpoint, ready to act, with its configuration.

    Args:
        path: a checkpoint, or a run's folder, which means its last one.
        overrides: changes to the configuration, such as "env.horizon=2000".

    Raises:
        CheckpointError: if it is not a whole checkpoint, or its parameters do not fit its configuration.
        ConfigError: if the configuration cannot be used.
    """
    path = checkpoint_path(Path(path))
    content = load_checkpoint(path)
    cfg = config_of(content, path, overrides)
    env = build_env(cfg, num_envs=1)
    try:
        agent = build_agent(cfg, env)
    finally:
        env.close()
    load_parameters(agent, content, path)
    return Restored(cfg, agent, content)


def load_parameters(agent: PPOAgent, content: dict[str, Any], path: Path) -> None:
    """Gives an agent the parameters of a checkpoint.

    Raises:
        CheckpointError: if they do not fit.
    """
    try:
        agent.load_state_dict(content["agent"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"the parameters in {path} do not fit its configuration: {said[:300]}") from None
