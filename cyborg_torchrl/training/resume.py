"""Resuming: find the run to continue, and restore the state of its trainer."""

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
from cyborg_torchrl.config.composition import drop_removed_keys, flat_options
from cyborg_torchrl.config.presets import OPEN_OPTIONS
from cyborg_torchrl.config.schema import NODES
from cyborg_torchrl.training.builders import Training
from cyborg_torchrl.training.checkpoint import CheckpointError, CheckpointFolder, Content, load_checkpoint
from cyborg_torchrl.training.distributed import Ranks
from cyborg_torchrl.training.loading import checkpoint_path, config_from_content, device_overrides, load_parameters
from cyborg_torchrl.training.run_folder import has_results, lock_run

LOGGER = logging.getLogger(__name__)
FREE_FOR_AUTO = ("logger", "imports", "train.total_timesteps", "train.num_threads")
"""Options that may differ between a run and the configuration for which `resume=auto` continues it."""
FIXED_IN_TRAIN = (
    "n_steps",
    "recurrent_mode",
    "burn_in",
    "seq_len",
    "state_stride",
    "num_minibatches",
    "freeze",
    "optimizer",
    "seed",
)
"""Options of `train` that an override cannot change in a resumed run. In other groups only `logger` can change."""


class ResumePoint(NamedTuple):
    """The run and the checkpoint to continue from."""

    folder: Path | None = None
    """Folder of the run; None: the checkpoint starts a new run."""
    checkpoint: Path | None = None
    """None: the run has no checkpoint yet, and starts again."""
    content: Content = {}
    """Content of the checkpoint."""
    summary: Mapping[str, Any] | None = None
    """Summary of a run that has ended."""

    def is_finished(self, cfg: DictConfig) -> bool:
        """Return whether the run has ended, and `train.total_timesteps` has no room for another update."""
        if self.summary is None or self.summary.get("is_interrupted") or not self.summary["total_updates"]:
            return False
        if self.has_stopped_early(cfg):
            return True
        updates = self.summary["total_updates"]
        steps_per_update = self.summary["total_timesteps"] // updates
        return cfg.train.total_timesteps // steps_per_update <= updates

    def has_stopped_early(self, cfg: DictConfig) -> bool:
        """Return whether the run has reached its `train.stop_at`, which has not changed since."""
        stop_at = self.content.get("config", {}).get("train", {}).get("stop_at")
        is_stopped = self.folder is not None and bool(self.content.get("stopped_early"))
        return is_stopped and stop_at == cfg.train.stop_at


def with_config_of_run(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Return the configuration of the run that `logger.resume` names, with overrides; `cfg` if it names none.

    Raises:
        CheckpointError: if there is no such run, or its checkpoint cannot be read.
        ConfigError: if an override changes an option that is fixed for a run.
    """
    if cfg.logger.resume in (None, "auto"):
        return cfg
    path = Path(cfg.logger.resume)
    found = _read(path)
    if found is None:
        if not (path / "config.yaml").is_file():
            raise CheckpointError(f"no checkpoint in '{path / 'checkpoints'}': is '{path}' a run's folder?")
        return load_config(str(path / "config.yaml"), overrides)
    path, content, _ = found  # `find_run` reports the faults
    if _run_folder(path) is None and not any(override.startswith("logger.run_name=") for override in overrides):
        overrides = [*overrides, "logger.run_name=null"]  # the name belongs to the old run
    changed = config_from_content(content, path, overrides)
    before = config_from_content(content, path, device_overrides(overrides))
    free = [f"train.{key}" for key in before.train if key not in FIXED_IN_TRAIN]
    difference = _difference(before, changed, ("logger", "imports", *free))
    if difference:
        raise ConfigError(
            f"logger.resume: the run of {path} cannot change {difference}; to begin a new run with its parameters, use "
            f"init_from={cfg.logger.resume} instead of resume."
        )
    return changed


def find_run(cfg: DictConfig) -> ResumePoint | None:
    """Return the run and the checkpoint that `logger.resume` asks for; None: a new run.

    Raises:
        CheckpointError: if there is no such run, or none of its checkpoints can be read.
        ConfigError: if `logger.run_name` names a run of another configuration.
    """
    if cfg.logger.resume is None:
        return None
    path = next(_candidates(cfg), None) if cfg.logger.resume == "auto" else Path(cfg.logger.resume)
    if path is None:
        return None
    summary, found = _summary(path), _read(path)
    if found is None:
        return ResumePoint(path, summary=summary)
    checkpoint, content, faults = found
    for fault in faults:
        LOGGER.warning("%s; the one before is taken", fault)
    folder = path if path.is_dir() else _run_folder(checkpoint)
    return ResumePoint(folder, checkpoint, content, summary)


def _run_folder(path: Path) -> Path | None:
    """Return the folder of the run that a checkpoint continues; None if it starts a new run."""
    folder = path.parent.parent
    return folder if path.name == "last.pt" and (folder / "manifest.json").is_file() else None


def _read(path: Path) -> tuple[Path, Content, list[str]] | None:
    """Read a checkpoint, or the newest readable one of a run's folder; None if the folder has no checkpoint.

    Returns the path, the content, and the faults of newer checkpoints.
    """
    if path.is_dir():
        return CheckpointFolder(path / "checkpoints").newest()
    path = checkpoint_path(path)
    return path, load_checkpoint(path), []


def _candidates(cfg: DictConfig) -> Iterator[Path]:
    """Yield the folder of `run_name`, or those of unfinished runs of this configuration, newest first.

    Raises:
        ConfigError: if the folder of `run_name` holds results of a run of another configuration.
    """
    base, free = Path(cfg.logger.base_dir), FREE_FOR_AUTO
    if cfg.init_from.path is not None:  # null became the value of the run that was loaded
        names = ("backbone.max_horizon", "memory.max_horizon", "backbone.window")
        free += tuple(name for name in names if OmegaConf.select(cfg, name, default=0) is None)
    if cfg.logger.run_name is not None:
        folder = base / cfg.logger.run_name
        if (folder / "manifest.json").is_file():
            difference = _difference(_config(folder), cfg, free)
            if not difference:
                yield folder
            elif has_results(folder):
                raise ConfigError(f"logger.run_name: {folder} is a run of another configuration: {difference}.")
        return
    manifests = sorted(base.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in (path.parent for path in manifests):
        summary = _summary(folder)
        is_finished = summary is not None and not summary.get("is_interrupted")
        if is_finished or _difference(_config(folder), cfg, free):
            continue
        lock = lock_run(folder)
        if lock is not None:  # no other process trains it
            lock.close()
            yield folder


def _summary(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None


def _config(folder: Path) -> DictConfig:
    """Return the configuration of a run; options that are newer than the run have their defaults."""
    defaults = {group: OmegaConf.to_container(OmegaConf.structured(node)) for group, node in NODES.items()}
    try:
        return OmegaConf.merge(defaults, drop_removed_keys(OmegaConf.load(folder / "config.yaml")))
    except (OSError, yaml.YAMLError):
        return OmegaConf.create({})


def _difference(before: DictConfig, now: DictConfig, free: tuple[str, ...]) -> str:
    """Describe the first option with another value, apart from free ones; "" if there is none."""
    old, new = flat_options(before), flat_options(now)
    for key in sorted({*old, *new}):
        if key in OPEN_OPTIONS and new.get(key) is None:  # the preset filled it when the old run was built
            continue
        is_free = any(key == part or key.startswith(f"{part}.") for part in free)
        if old.get(key) != new.get(key) and not is_free:
            return f"{key} (it was {old.get(key)}, and is {new.get(key)} now)"
    return ""


def training_state(training: Training) -> Content:
    """Return the state from which a run continues bit by bit. All ranks call this; the first gets the state."""
    trainer = training.trainer
    ranks = trainer.ranks.gather_objects({"collector": collector_state(trainer.collector), "rng": random_state()})
    first, others = (ranks[0], ranks[1:]) if ranks else ({}, [])
    return {"agent": training.agent.state_dict(), "trainer": trainer.state_dict(), **first, "other_ranks": others}


def restore_training(training: Training, content: Content, path: Path, seed: int) -> list[str]:
    """Restore the state of `training_state`.

    Args:
        training: the new trainer and agent.
        content: the content of the checkpoint.
        path: its file, for messages.
        seed: the run's seed, for everything that the checkpoint cannot restore.

    Returns:
        Warnings about everything that could not be restored.

    Raises:
        CheckpointError: if the checkpoint does not fit.
    """
    trainer = training.trainer
    load_parameters(training.agent, content, path)
    try:
        trainer.load_state_dict(content["trainer"])
        trainer.share_parameters()
        rank_state = _state_of_rank(trainer.ranks, content)
        rank = [trainer.ranks.rank] if trainer.ranks.rank else []
        fresh_seed = int(np.random.SeedSequence([seed, trainer.num_updates, *rank]).generate_state(1)[0])
        warnings = _restore_collector(trainer.collector, rank_state["collector"], fresh_seed)
        if rank_state["rng"] is None:
            torch.manual_seed(fresh_seed)
        else:
            set_random_state(rank_state["rng"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} does not fit its configuration: {type(error).__name__}: {reason}") from None
    return warnings


def _restore_collector(collector: Any, state: Mapping[str, Any] | None, seed: int) -> list[str]:
    if state is None:
        collector.set_seed(seed)
        return ["all environments begin new episodes: where they were is not known"]
    lost = resume_collector(collector, state)
    return [f"{lost} environments begin new episodes: theirs are not decided by seed and actions"] if lost else []


def _state_of_rank(ranks: Ranks, content: Content) -> Mapping[str, Any]:
    """Return this rank's part of a checkpoint; without one, the run had another number of ranks."""
    all_ranks = [content, *content.get("other_ranks", [])]
    return all_ranks[ranks.rank] if len(all_ranks) == ranks.size else {"collector": None, "rng": None}
