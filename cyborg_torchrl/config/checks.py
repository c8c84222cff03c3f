"""Checks of a composed configuration, beyond the types of its values."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from cyborg_torchrl.config.presets import PRESETS, choose_preset
from cyborg_torchrl.config.schema import GROUPS, NODES
from cyborg_torchrl.registry import UnknownNameError, did_you_mean, options_of

REQUIREMENTS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "above": ("be greater than {}", operator.gt),
    "minimum": ("be {} or more", operator.ge),
    "below": ("be less than {}", operator.lt),
    "interval": ("lie in {}", lambda number, interval: interval[0] <= number <= interval[1]),
}
"""Limits of numbers: the text of a message, and the test of a number against the limit."""


class ConfigError(ValueError):
    """A configuration that cannot be used. The message is one line: the mistake, and a correct value."""


def validate(cfg: DictConfig) -> None:
    """Check a configuration, and choose its preset.

    Raises:
        ConfigError: at the first impossible value.
    """
    _check_keys(cfg)
    for group, node in NODES.items():
        for field in dataclasses.fields(node):
            _check_limits(f"{group}.{field.name}", cfg[group][field.name], field.metadata)
    _check_limits("env.num_envs", cfg.env.get("num_envs"), {"above": 0})
    _check_limits("preset", cfg.preset, {"choices": ("auto", *PRESETS)})
    if cfg.train.weight_decay and cfg.train.optimizer != "adamw":
        raise ConfigError(f"train.weight_decay belongs to optimizer=adamw; the optimizer is '{cfg.train.optimizer}'.")
    _check_init_from(cfg.init_from)
    name = cfg.logger.run_name
    if name is not None and (Path(name).is_absolute() or ".." in Path(name).parts):
        raise ConfigError(f"logger.run_name must be the name of a folder in logger.base_dir; got '{name}'.")
    options = cfg.env.get("options")
    if options is not None and not isinstance(options, DictConfig):
        raise ConfigError(f"env.options must be a mapping, as in 'env.options={{g: 5.0}}'; got {options!r}.")
    device = resolve_device(cfg.train.device)
    if cfg.collector.cudagraph and device.type != "cuda":
        raise ConfigError(f"collector.cudagraph needs train.device=cuda; the device here is '{device}'.")
    if cfg.train.cudagraph and (device.type != "cuda" or cfg.train.optimizer == "rmsprop"):
        raise ConfigError(
            f"train.cudagraph needs train.device=cuda and adam or adamw; here they are '{device}' and "
            f"'{cfg.train.optimizer}'."
        )
    choose_preset(cfg)
    _check_owners(cfg)
    _check_chunks(cfg)


def _check_keys(cfg: DictConfig) -> None:
    """Refuse keys that nothing reads, and missing groups: Hydra's + and ~ can make them despite the schema."""
    for group in (*GROUPS, *NODES):
        exists = group in cfg and not OmegaConf.is_missing(cfg, group) and isinstance(cfg[group], DictConfig)
        if not exists or (group in GROUPS and "name" not in cfg[group]):
            raise ConfigError(f"'{group}' is missing from the configuration; it must choose one of its options.")
        for key in cfg[group]:
            names = _option_names(cfg, group)
            if key not in names:
                raise ConfigError(f"unknown key '{group}.{key}': {did_you_mean(str(key), names)}")
            if OmegaConf.is_missing(cfg[group], key):
                raise ConfigError(f"{group}.{key} must be given: {group}={cfg[group].name} has no default for it.")


def _option_names(cfg: DictConfig, group: str) -> list[str]:
    if group in NODES:
        return [field.name for field in dataclasses.fields(NODES[group])]
    try:
        return ["name", *options_of(GROUPS[group].get(cfg[group].name))]
    except UnknownNameError as error:
        raise ConfigError(str(error)) from None


def _check_limits(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    """Check one value, or each item of a list, against the limits of its field (see `schema.option`)."""
    for item in value if isinstance(value, ListConfig) else [value]:
        if item is None:
            continue
        if isinstance(item, float) and not math.isfinite(item):
            raise ConfigError(f"{key} must be a finite number; got {value}.")
        choices = limits.get("choices")
        if choices and item not in choices:
            raise ConfigError(f"unknown {key} '{item}': {did_you_mean(str(item), choices)}")
        for name, (requirement, is_met) in REQUIREMENTS.items():
            if name in limits and not is_met(item, limits[name]):
                raise ConfigError(f"{key} must {requirement.format(limits[name])}; got {value}.")


def _check_owners(cfg: DictConfig) -> None:
    """Refuse options of another mode or another collector than the chosen one, which would be ignored.

    Mode `none` ignores those of all modes, so that one key turns an agent into its control without memory.
    """
    for group, selector, label, noun in (
        ("train", "recurrent_mode", "recurrent_mode", "mode"),
        ("collector", "name", "collector", "collector"),
    ):
        chosen = cfg[group][selector]
        for field in dataclasses.fields(NODES[group]):
            owners = field.metadata.get("belongs_to")
            if owners and chosen not in (*owners, "none") and cfg[group][field.name] != field.default:
                raise ConfigError(
                    f"{group}.{field.name} belongs to {label}={' or '.join(owners)}; the {noun} is '{chosen}'."
                )


def _check_init_from(options: Any) -> None:
    """Refuse options of `init_from` that would be ignored, and those that exclude each other."""
    for field in dataclasses.fields(NODES["init_from"]):
        if options.path is None and options[field.name] != field.default:
            raise ConfigError(f"init_from.{field.name} needs init_from=PATH: a run's folder, or a checkpoint.")
    if options.optimizer and options.only is not None:
        raise ConfigError("init_from.optimizer needs the state of all parameters: leave init_from.only out.")


def _check_chunks(cfg: DictConfig) -> None:
    """Check that the options of chunks and stored states fit together."""
    train = cfg.train
    if train.recurrent_mode == "tbptt" and train.seq_len is None and cfg.preset != "general":
        raise ConfigError("train.seq_len must be given with recurrent_mode=tbptt: how far a gradient reaches back.")
    if train.state_stride is None:
        return
    if train.seq_len is None:
        raise ConfigError("train.state_stride needs train.seq_len: it is a multiple of it.")
    if train.state_stride % train.seq_len:
        nearest = max(1, round(train.state_stride / train.seq_len)) * train.seq_len
        raise ConfigError(
            f"train.state_stride = {train.state_stride} must be a multiple of train.seq_len = {train.seq_len}; the "
            f"nearest is {nearest}."
        )
    if train.refresh_states and train.state_stride != train.seq_len:
        raise ConfigError("train.refresh_states needs a stored state for each chunk: leave train.state_stride out.")


def resolve_device(name: str) -> torch.device:
    """Return the device of a name: "cpu", "cuda", "cuda:1", or "auto".

    Raises:
        ConfigError: if the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"train.device '{name}' is not supported; use cpu, cuda, cuda:N or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"train.device is '{name}', but torch sees {torch.cuda.device_count()} CUDA devices here; use cpu or auto."
        )
    return device
