"""Begin a new run with the parameters of another one."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cyborg_torchrl.config import ConfigError
from cyborg_torchrl.modules.parts import parts_of, select
from cyborg_torchrl.training.builders import Training
from cyborg_torchrl.training.checkpoint import CheckpointError, Content, load_checkpoint
from cyborg_torchrl.training.loading import checkpoint_path, config_from_content, fixed_horizons
from cyborg_torchrl.training.resume import ResumePoint
from cyborg_torchrl.training.trainer import PPOTrainer

STATISTICS = "env_statistics"
STATISTICS_OWNERS = {"env_statistics.observation": "encoder", "env_statistics.reward": "value_head"}
"""The part that was trained with statistics, and needs them."""
MAX_NAMED = 3
"""Maximum number of entries that an error message names."""


class Source(NamedTuple):
    """The checkpoint from which a new run takes its parameters."""

    path: Path
    content: Content

    def record(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        return {"checkpoint": str(self.path.resolve()), "update": self.content.get("update")}


def find_source(cfg: DictConfig, point: ResumePoint) -> Source | None:
    """Return the checkpoint that `init_from.path` names; None without it, or if the run continues from its own.

    Raises:
        CheckpointError: if there is no such checkpoint, or it cannot be read.
    """
    if cfg.init_from.path is None or point.checkpoint is not None:
        return None
    path = Path(cfg.init_from.path)
    best = path / "checkpoints" / "best.pt"
    try:
        path = best if best.is_file() else checkpoint_path(path)
        content = load_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"init_from: {error}") from None
    for entry in ("agent", "config"):
        if not isinstance(content.get(entry), dict):
            raise CheckpointError(f"init_from: {path} holds no {entry}.")
    return Source(path, content)


def with_trained_memory(cfg: DictConfig, source: Source | None, point: ResumePoint) -> DictConfig:
    """Return the configuration with `max_horizon` and `window` as trained, where they are null and memory is loaded.

    Most values that depend on `max_horizon` are parameters, which are loaded. Some backbones also have fixed ones.

    Args:
        cfg: the configuration.
        source: the checkpoint from which a new run takes its parameters.
        point: the checkpoint of such a run if it is resumed.
    """
    path, content = (point.checkpoint, point.content) if source is None else source
    if path is None or not _loads_memory(cfg):
        return cfg
    before = content["config"]
    open_options = [
        (group, name)
        for group, name in (("backbone", "max_horizon"), ("memory", "max_horizon"), ("backbone", "window"))
        if cfg[group].get(name, 0) is None and before.get(group, {}).get("name") == cfg[group].name
    ]
    if any(before[group].get(name) is None for group, name in open_options):
        trained = config_from_content(content, path, [f"train.device={cfg.train.device}"])
        before = OmegaConf.merge(trained, OmegaConf.from_dotlist(fixed_horizons(trained)))
    cfg = cfg.copy()
    for group, name in open_options:
        cfg[group][name] = before[group][name]
    return cfg


def _loads_memory(cfg: DictConfig) -> bool:
    if cfg.init_from.path is None:
        return False
    parts = [pattern.partition(".")[0] for pattern in cfg.init_from.only or ["*"]]
    return any(fnmatchcase(name, part) for name in ("backbone", "critic") for part in parts)


def load_source(training: Training, cfg: DictConfig, source: Source) -> str:
    """Load the chosen parts of a checkpoint into a new run. Return a line that names them.

    Raises:
        CheckpointError: if they do not fit this run.
        ConfigError: if a pattern selects nothing.
    """
    trained, state = source.content["agent"], training.agent.state_dict()
    names = _selected([*state, *(name for name in trained if name not in state)], cfg.init_from)
    _check_fit(names, trained, state, source.path)
    training.agent.load_state_dict({**state, **{name: trained[name] for name in names}})
    if cfg.init_from.optimizer:
        _load_optimizer(training.trainer, source, cfg.train.optimizer)
    training.trainer.share_parameters()
    parts = ", ".join(parts_of(names)) + (", optimizer" if cfg.init_from.optimizer else "")
    return f"starting with {source.path} (update {source.content.get('update', '?')}): {parts}"


def _selected(names: list[str], options: DictConfig) -> list[str]:
    """Return the names of the entries to load, in their order."""
    try:
        selected = set(names) if options.only is None else select(names, options.only)
    except ValueError as error:
        raise ConfigError(f"init_from.only: {error}") from None
    for statistics, owner in STATISTICS_OWNERS.items():
        if parts_of(selected).count(owner):
            selected |= {name for name in names if name.startswith(statistics)}
    return [name for name in names if name in selected and (options.statistics or not name.startswith(STATISTICS))]


def _check_fit(names: list[str], trained: Mapping[str, Any], state: Mapping[str, Any], path: Path) -> None:
    """Check that entries have the same shapes in a checkpoint and in this run, and are finite.

    Raises:
        CheckpointError: if they do not; the message names the first ones.
    """
    problems: dict[str, str] = {}
    for name in names:
        there, here = _shape(trained.get(name)), _shape(state.get(name))
        if there != here:
            problems[name] = f"{name} is {there or 'missing'} there and {here or 'missing'} here"
        elif not trained[name].isfinite().all():
            raise CheckpointError(f"init_from: {path} holds parameters that are no finite numbers ({name}).")
    if not problems:
        return
    shown = ", ".join(list(problems.values())[:MAX_NAMED])
    more = f", and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
    faulty = parts_of(problems)
    if faulty == [STATISTICS]:
        advice = "set the same transforms.normalize_observation and normalize_reward, or init_from.statistics=false"
    else:
        fitting = [part for part in parts_of(names) if part not in (*faulty, STATISTICS)]
        parts = f"; init_from.only=[{','.join(fitting)}] takes the parts that fit" if fitting else ""
        advice = f"its configuration is in the config.yaml of its run (--config){parts}"
    raise CheckpointError(f"init_from: {path} does not fit this run: {shown}{more}; {advice}.")


def _shape(entry: Any) -> str:
    return str(list(entry.shape)) if isinstance(entry, Tensor) else ""


def _load_optimizer(trainer: PPOTrainer, source: Source, kind: str) -> None:
    """Load the optimiser's state; the learning rate and the other options stay those of this run.

    Raises:
        CheckpointError: if it is the state of another optimiser than `kind`, or of other parameters.
    """
    before = source.content["config"]["train"].get("optimizer", "adam")  # older runs had no choice
    if before != kind:
        raise CheckpointError(
            f"init_from.optimizer: {source.path} has the state of {before}, and this run uses {kind}; use "
            f"train.optimizer={before}, or init_from.optimizer=false."
        )
    content: Any = source.content.get("trainer", {})
    states = content.get("optimizer", {}).get("state", {})
    shapes = {number: list(parameter.shape) for number, parameter in enumerate(trainer.parameters)}
    moment = "square_avg" if kind == "rmsprop" else "exp_avg"
    if {number: list(state[moment].shape) for number, state in states.items()} != shapes:
        raise CheckpointError(
            f"init_from.optimizer: the optimiser in {source.path} has other parameters than this one ({len(states)} "
            f"there, {len(shapes)} here); use the same train.freeze, or init_from.optimizer=false."
        )
    own = trainer.optimizer.state_dict()
    trainer.optimizer.load_state_dict({"state": states, "param_groups": own["param_groups"]})
