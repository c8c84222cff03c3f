"""Build the rollout buffer of a configuration."""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from torchrl.data import LazyMemmapStorage, LazyTensorStorage
from torchrl.envs import EnvBase

from cyborg_torchrl.config import ConfigError, resolve_device
from cyborg_torchrl.data import EpisodeBuffer, RecurrentRolloutBuffer, RolloutBuffer
from cyborg_torchrl.data.chunks import ceil_div
from cyborg_torchrl.envs.make import episode_attribute

DEFAULT_STEPS = 128
"""Steps of a rollout if neither the configuration nor the environment defines them."""
Buffer = RolloutBuffer | RecurrentRolloutBuffer | EpisodeBuffer


def rollout_length(cfg: DictConfig, env: EnvBase) -> int:
    """Return T, the steps of each environment in a rollout.

    Raises:
        ConfigError: if a rollout has fewer stored rows than minibatches.
    """
    steps = cfg.train.n_steps or episode_attribute(env, "max_episode_steps") or DEFAULT_STEPS
    rows = env.batch_size.numel() * ceil_div(steps, _stored_row_length(cfg, steps, env))
    if cfg.train.num_minibatches > rows:
        raise ConfigError(
            f"train.num_minibatches = {cfg.train.num_minibatches}, but a rollout has only {rows} sequences to split; "
            f"use {rows} or fewer."
        )
    return steps


def build_buffer(cfg: DictConfig, env: EnvBase, steps: int) -> Buffer:
    """Build the buffer of the recurrent mode, for rollouts of `steps` steps of each environment."""
    train, num_envs = cfg.train, env.batch_size.numel()
    num_steps = num_envs * steps
    row_length = _row_length(cfg, steps, env)
    batch_size = ceil_div(num_envs * ceil_div(steps, row_length), train.num_minibatches)
    if train.recurrent_mode == "none":
        return RolloutBuffer(num_steps, batch_size, storage=_storage(cfg, num_steps))
    if train.recurrent_mode == "episode":
        rows = num_envs + 2 * ceil_div(num_steps, row_length)
        return EpisodeBuffer(num_steps, row_length, batch_size, num_envs=num_envs, storage=_storage(cfg, rows))
    stride = _stored_row_length(cfg, steps, env)
    padded_steps = row_length * ceil_div(steps, row_length)
    return RecurrentRolloutBuffer(
        num_steps,
        row_length,
        batch_size,
        num_envs=num_envs,
        burn_in=train.burn_in,
        state_stride=stride,
        state_dtype=None if train.state_dtype == "float32" else getattr(torch, train.state_dtype),
        start_state=train.start_state,
        storage=_storage(cfg, num_envs * ceil_div(steps, min(stride, padded_steps))),
    )


def _storage(cfg: DictConfig, rows: int) -> LazyTensorStorage:
    if cfg.train.storage == "memmap":
        return LazyMemmapStorage(rows)
    return LazyTensorStorage(rows, device=resolve_device(cfg.train.device) if cfg.train.storage == "device" else "cpu")


def _row_length(cfg: DictConfig, steps: int, env: EnvBase) -> int:
    """Return the steps of a sequence in a minibatch."""
    mode = cfg.train.recurrent_mode
    if mode == "none":
        return 1
    if mode == "episode":
        return min(steps, episode_attribute(env, "max_episode_steps") or steps)
    return min(steps, cfg.train.seq_len or steps)


def _stored_row_length(cfg: DictConfig, steps: int, env: EnvBase) -> int:
    """Return the steps of a stored row, which has one memory state."""
    row_length = _row_length(cfg, steps, env)
    return row_length if row_length == steps else cfg.train.state_stride or row_length
