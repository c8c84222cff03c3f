"""Checks of what types alone cannot."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from cyborg_torchrl.config.schema import BACKENDS, GROUPS, NODES, RECURRENT_MODES, STATE_DTYPES, STORAGES, TrainConfig
from cyborg_torchrl.registry import (
    UnknownNameError,
    did_you_mean,
    options_of,
)


class ConfigError(ValueError):
    """Configuration that cannot be used; the message is one line that says what is wrong and what would be right."""


def validate(cfg: DictConfig) -> None:
    """Checks what types alone cannot.

    Raises:
        ConfigError: at the first impossible value.
    """
    _check_keys(cfg)
    train: TrainConfig = cfg.train
    for group in ("train", "transforms"):
        for key, value in cfg[group].items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{group}.{key} must be a finite number; got {value}.")
    for key in ("vf_coef", "ent_coef", "burn_in", "seed"):
        if cfg.train[key] < 0:
            raise ConfigError(f"train.{key} must be 0 or more; got {cfg.train[key]}.")
    if train.seed >= 2**63:
        raise ConfigError(f"train.seed must be less than 2^63; got {train.seed}.")
    if any(size < 1 for size in cfg.encoder.hidden_sizes):
        raise ConfigError(f"encoder.hidden_sizes must be greater than 0; got {list(cfg.encoder.hidden_sizes)}.")
    for key in ("num_cpus", "num_gpus"):
        if not 0.0 <= cfg.collector[key] < math.inf:
            raise ConfigError(f"collector.{key} must be a finite number, 0 or more; got {cfg.collector[key]}.")
    if cfg.collector.address is not None and cfg.collector.name != "ray":
        raise ConfigError(f"collector.address belongs to collector=ray; the collector is '{cfg.collector.name}'.")
    if cfg.collector.cudagraph and cfg.collector.name != "fused":
        raise ConfigError(f"collector.cudagraph belongs to collector=fused; the collector is '{cfg.collector.name}'.")
    positive = {
        "train.adam_eps": train.adam_eps,
        "train.total_timesteps": train.total_timesteps,
        "train.n_epochs": train.n_epochs,
        "train.num_minibatches": train.num_minibatches,
        "train.learning_rate": train.learning_rate,
        "train.max_grad_norm": train.max_grad_norm,
        "train.clip_range": train.clip_range,
        "train.num_threads": train.num_threads,
        "env.num_envs": cfg.env.get("num_envs", 1),
        "encoder.features": cfg.encoder.features,
        "encoder.embedding_size": cfg.encoder.embedding_size,
        "collector.num_workers": cfg.collector.num_workers,
        "logger.keep_checkpoints": cfg.logger.keep_checkpoints,
        "logger.checkpoint_every": cfg.logger.checkpoint_every,
        "transforms.frame_stack": cfg.transforms.frame_stack,
    }
    optional = {"train.n_steps": train.n_steps, "train.seq_len": train.seq_len, "train.target_kl": train.target_kl}
    optional |= {"train.clip_range_vf": train.clip_range_vf, "train.state_stride": train.state_stride}
    optional |= {"train.micro_batch_steps": train.micro_batch_steps}
    optional |= {"transforms.clip_reward": cfg.transforms.clip_reward}
    for key, value in {**positive, **{k: v for k, v in optional.items() if v is not None}}.items():
        if value <= 0:
            raise ConfigError(f"{key} must be greater than 0; got {value}.")
    for key, value in (("gamma", train.gamma), ("gae_lambda", train.gae_lambda)):
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"train.{key} must lie in [0, 1]; got {value}.")
    name = cfg.logger.run_name
    if name is not None and (Path(name).is_absolute() or ".." in Path(name).parts):
        raise ConfigError(f"logger.run_name must be the name of a folder in logger.base_dir; got '{name}'.")
    options = cfg.env.get("options")
    if options is not None and not isinstance(options, DictConfig):
        raise ConfigError(f"env.options must be a mapping, as in 'env.options={{g: 5.0}}'; got {options!r}.")
    if cfg.logger.eval_episodes < 0:
        raise ConfigError(f"logger.eval_episodes must be 0 or more; got {cfg.logger.eval_episodes}.")
    for key, value, known in (
        ("train.recurrent_mode", train.recurrent_mode, RECURRENT_MODES),
        ("train.normalize_advantage", train.normalize_advantage, ("rollout", "step", "minibatch", "none")),
        ("train.lr_schedule", train.lr_schedule, ("constant", "linear")),
        ("train.state_dtype", train.state_dtype, STATE_DTYPES),
        ("train.storage", train.storage, STORAGES),
        ("train.start_state", train.start_state, ("stored", "initial")),
        ("collector.name", cfg.collector.name, ("rollout", "fused", "single", "multi_sync", "ray")),
        ("encoder.convolutions", cfg.encoder.convolutions, ("impala", "nature")),
        ("logger.eval_actions", cfg.logger.eval_actions, ("greedy", "sampled")),
        ("encoder.discrete", cfg.encoder.discrete, ("one_hot", "embedding")),
    ):
        if value not in known:
            raise ConfigError(f"unknown {key} '{value}': {did_you_mean(value, known)}")
    for backend in cfg.logger.backends:
        if backend not in BACKENDS:
            raise ConfigError(f"unknown logger.backends '{backend}': {did_you_mean(backend, BACKENDS)}")
    _check_mode(train)
    device = resolve_device(train.device)
    if cfg.collector.cudagraph and device.type != "cuda":
        raise ConfigError(f"collector.cudagraph needs train.device=cuda; the device here is '{device}'.")


def _check_mode(train: Any) -> None:
    """What belongs to another mode than the chosen one is refused, not ignored."""
    mode = train.recurrent_mode
    belongs = {
        "burn_in": (train.burn_in, ("burn_in",)),
        "seq_len": (train.seq_len, ("burn_in", "tbptt")),
        "state_stride": (train.state_stride, ("burn_in", "tbptt")),
        "refresh_states": (train.refresh_states, ("burn_in", "tbptt")),
        "start_state": (train.start_state != "stored", ("burn_in", "tbptt")),
        "state_dtype": (train.state_dtype != "float32", ("burn_in", "tbptt")),
    }
    for key, (value, modes) in belongs.items():
        if value and mode not in modes:
            raise ConfigError(f"train.{key} belongs to recurrent_mode={' or '.join(modes)}; the mode is '{mode}'.")
    if mode == "tbptt" and train.seq_len is None:
        raise ConfigError("train.seq_len must be given with recurrent_mode=tbptt: how far a gradient reaches back.")
    if train.state_stride and train.seq_len is None:
        raise ConfigError("train.state_stride needs train.seq_len: it is a multiple of it.")
    if train.state_stride and train.seq_len and train.state_stride % train.seq_len:
        nearest = max(1, round(train.state_stride / train.seq_len)) * train.seq_len
        raise ConfigError(
            f"train.state_stride = {train.state_stride} must be a multiple of train.seq_len = {train.seq_len}; the "
            f"nearest is {nearest}."
        )
    if train.refresh_states and train.state_stride and train.state_stride != train.seq_len:
        raise ConfigError("train.refresh_states needs a stored state for each chunk: leave train.state_stride out.")


def _check_keys(cfg: DictConfig) -> None:
    """Hydra's + and ~ can add and remove keys behind the schema's back; nothing reads them, so they are mistakes."""
    for group in (*GROUPS, *NODES):
        is_there = group in cfg and not OmegaConf.is_missing(cfg, group) and isinstance(cfg[group], DictConfig)
        if not is_there or (group in GROUPS and "name" not in cfg[group]):
            raise ConfigError(f"'{group}' is missing from the configuration; it must choose one of its options.")
    known = {group: [f.name for f in dataclasses.fields(node)] for group, node in NODES.items()}
    for group, registry in GROUPS.items():
        try:
            known[group] = ["name", *options_of(registry.get(cfg[group].name))]
        except UnknownNameError as error:
            raise ConfigError(str(error)) from None
    for group, names in known.items():
        for key in cfg[group]:
            if key not in names:
                raise ConfigError(f"unknown key '{group}.{key}': {did_you_mean(str(key), names)}")


def resolve_device(name: str) -> torch.device:
    """Turns "cpu", "cuda", "cuda:1" or "auto" into a device that is there.

    Raises:
        ConfigError: if it is not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"train.device '{name}' is not a device; use cpu, cuda, cuda:N or auto.") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"train.device '{name}' is not supported; use cpu, cuda, cuda:N or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"train.device is '{name}', but torch sees {torch.cuda.device_count()} CUDA devices here; use cpu or auto."
        )
    return device
