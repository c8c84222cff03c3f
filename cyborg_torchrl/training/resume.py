"""Finds the run to go on with, and brings a trainer back to where it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from cyborg_torchrl.collectors.resume import collector_state, resume_collector
from cyborg_torchrl.collectors.rng import random_state, set_random_state
from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.training.builders import Training
from cyborg_torchrl.training.checkpoint import CheckpointError, CheckpointFolder, Content, load_checkpoint
from cyborg_torchrl.training.distributed import Ranks
from cyborg_torchrl.training.loading import checkpoint_path, config_of, device_overrides, load_parameters
from cyborg_torchrl.training.run import lock_run

LOGGER = logging.getLogger(__name__)
MAY_CHANGE = ("logger", "train.total_timesteps", "train.num_threads")
"""What does not make a run another one."""
FIXED_IN_TRAIN = ("n_steps", "recurrent_mode", "burn_in", "seq_len", "state_stride", "num_minibatches", "seed")
"""What of `train` a run cannot change on its way; nor anything of other groups than the logger."""


class Resumption(NamedTuple):
    """Where a run goes on."""

    folder: Path | None
    """The run's folder; None: a new one."""
    checkpoint: Path | None
    """None: there is none yet, the run begins again."""
    content: Content | None
    summary: Mapping[str, Any] | None
    """Of a run that is done."""


def with_config_of_run(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration of the run that `logger.resume` names, with the overrides; as it is where it names none.

    Raises:
        CheckpointError: if there is no such run, or its checkpoint cannot be read.
        ConfigError: if the overrides change what a run cannot change.
    """
    if cfg.logger.resume in (None, "auto"):
        return cfg
    path = Path(cfg.logger.resume)
    if path.is_dir() and (path / "config.yaml").is_file() and not list(path.glob("checkpoints/*.pt")):
        return load_config(str(path / "config.yaml"), overrides)
    path, content = _read(path, is_told=False)  # `find_run` tells
    if _run_of(path) is None and not any(override.startswith("logger.run_name=") for override in overrides):
        overrides = [*overrides, "logger.run_name=null"]  # the name is the old run's
    changed = config_of(content, path, overrides)
    _check_unchanged(config_of(content, path, device_overrides(overrides)), changed, path)
    return changed


def find_run(cfg: DictConfig) -> Resumption | None:
    """What `logger.resume` asks for; None: a new run.

    Raises:
        CheckpointError: if there is no such run, or none of its checkpoints can be read.
        ConfigError: if the configuration is another than that of the run.
    """
    resume = cfg.logger.resume
    if resume is None:
        return None
    if resume == "auto":
        folder = next(_candidates(cfg), None)
        return None if folder is None else _resumption(folder)
    path = Path(resume)
    if path.is_dir():
        return _resumption(path)
    path, content = _read(path)
    return Resumption(_run_of(path), path, content, None)


def _run_of(path: Path) -> Path | None:
    """The folder of the run that goes on from a checkpoint; None: a new one begins there."""
    folder = path.parent.parent
    return folder if path.name == "last.pt" and (folder / "manifest.json").is_file() else None


def _read(path: Path, *, is_told: bool = True) -> tuple[Path, Content]:
    """A checkpoint, or the newest whole one of a run; a warning tells of those that are not."""
    if path.is_dir():
        newest = CheckpointFolder(path / "checkpoints").newest()
        if newest is None:
            raise CheckpointError(f"no checkpoint in '{path / 'checkpoints'}': is '{path}' a run's folder?")
        for fault in newest[2] if is_told else ():
            LOGGER.warning("%s; the one before is taken", fault)
        return newest[0], newest[1]
    path = checkpoint_path(path)
    return path, load_checkpoint(path)


def _resumption(folder: Path) -> Resumption:
    summary = _summary(folder)
    if not list((folder / "checkpoints").glob("*.pt")):
        return Resumption(folder, None, None, summary)
    path, content = _read(folder)
    return Resumption(folder, path, content, summary)


def _candidates(cfg: DictConfig) -> Iterator[Path]:
    """The folder of `run_name`, or those of runs of this configuration that are neither done nor running, newest first.

    Raises:
        ConfigError: if the folder of `run_name` holds a run of another configuration.
    """
    base = Path(cfg.logger.base_dir)
    if cfg.logger.run_name is not None:
        folder = base / cfg.logger.run_name
        if (folder / "manifest.json").is_file():
            difference = _difference(_config(folder), cfg, MAY_CHANGE)
            if difference:
                raise ConfigError(f"logger.run_name: {folder} is a run of another configuration: {difference}.")
            yield folder
        return
    found = sorted(base.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in (path.parent for path in found):
        summary = _summary(folder)
        if summary is not None and not summary.get("is_interrupted"):
            continue
        if _difference(_config(folder), cfg, MAY_CHANGE):
            continue
        lock = lock_run(folder)
        if lock is not None:
            lock.close()
            yield folder


def _summary(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None


def _config(folder: Path) -> DictConfig:
    try:
        return OmegaConf.load(folder / "config.yaml")
    except (OSError, yaml.YAMLError):
        return OmegaConf.create({})


def _check_unchanged(before: DictConfig, now: DictConfig, path: Path) -> None:
    """Raises ConfigError where a run is to go on as another one."""
    free = ("logger", *(f"train.{key}" for key in before.train if key not in FIXED_IN_TRAIN))
    difference = _difference(before, now, free)
    if difference:
        raise ConfigError(f"logger.resume: the run of {path} cannot change {difference}; begin a new run for that.")


def _difference(before: DictConfig, now: DictConfig, free: tuple[str, ...]) -> str:
    """The first key with another value; empty if there is none."""
    old, new = _flat(OmegaConf.to_container(before)), _flat(OmegaConf.to_container(now))
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key) and not any(key == part or key.startswith(f"{part}.") for part in free):
            return f"{key} (it was {old.get(key)}, and is {new.get(key)} now)"
    return ""


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    return {
        key: value
        for name, part in content.items()
        for key, value in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def training_state(training: Training) -> Content:
    """All that a run needs to go on bit by bit; all ranks have to ask, and the first one gets it."""
    trainer = training.trainer
    ranks = trainer.ranks.gather_objects({"collector": collector_state(trainer.collector), "rng": random_state()})
    first, others = (ranks[0], ranks[1:]) if ranks else ({}, [])
    return {"agent": training.agent.state_dict(), "trainer": trainer.state_dict(), **first, "other_ranks": others}


def restore_training(training: Training, content: Content, path: Path, seed: int) -> list[str]:
    """Brings a trainer back to where it was.

    Returns:
        What is not as it was, in words.

    Raises:
        CheckpointError: if the checkpoint does not fit.
    """
    trainer, agent, _ = training
    load_parameters(agent, content, path)
    notes: list[str] = []
    try:
        trainer.load_state_dict(content["trainer"])
        trainer.share_parameters()
        own = _of_rank(trainer.ranks, content)
        state, entropy = own["collector"], [seed, trainer.num_updates]
        if trainer.ranks.rank:
            entropy.append(trainer.ranks.rank)
        fresh = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        if state is not None:
            lost = resume_collector(trainer.collector, state)
            if lost:
                notes.append(f"{lost} environments begin new episodes: theirs are not decided by seed and actions")
        else:
            trainer.collector.set_seed(fresh)
            notes.append("all environments begin new episodes: where they were is not known")
        if own["rng"] is None:
            torch.manual_seed(fresh)
        else:
            set_random_state(own["rng"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, IndexError) as error:
        said = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} does not fit its configuration: {type(error).__name__}: {said}") from None
    return notes


def _of_rank(ranks: Ranks, content: Content) -> Mapping[str, Any]:
    """Where this process stood; unknown if the run was trained by another number of processes."""
    all_ranks = [content, *content.get("other_ranks", [])]
    return all_ranks[ranks.rank] if len(all_ranks) == ranks.size else {"collector": None, "rng": None}
