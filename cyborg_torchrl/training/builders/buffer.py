"""From configuration to rollout buffer."""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from torchrl.data import LazyMemmapStorage, LazyTensorStorage
from torchrl.envs import EnvBase

from cyborg_torchrl.config import ConfigError, resolve_device
from cyborg_torchrl.data import EpisodeBuffer, RecurrentRolloutBuffer, RolloutBuffer
from cyborg_torchrl.envs.make import episode_attribute

DEFAULT_STEPS = 128
"""Steps of a rollout where neither the configuration nor the environment says how many."""
Buffer = RolloutBuffer | RecurrentRolloutBuffer | EpisodeBuffer


def rollout_length(cfg: DictConfig, env: EnvBase) -> int:
    """Steps of each environment in a rollout, checked against the minibatches.

    Raises:
        ConfigError: if it has fewer sequences than there are minibatches.
    """
    train = cfg.train
    steps = train.n_steps or episode_attribute(env, "max_episode_steps") or DEFAULT_STEPS
    num_envs = env.batch_size.numel()
    row = _row_length(cfg, steps, env)
    rows = num_envs * -(-steps // (row if row == steps else train.state_stride or row))
    if train.num_minibatches > rows:
        raise ConfigError(
            f"train.num_minibatches = {train.num_minibatches}, but a rollout has only {rows} sequences to split; use "
            f"{rows} or fewer."
        )
    return steps


def build_buffer(cfg: DictConfig, env: EnvBase, steps: int) -> Buffer:
    """Builds the buffer that the recurrent mode needs."""
    train, num_envs = cfg.train, env.batch_size.numel()
    row = _row_length(cfg, steps, env)
    batch_size = -(-num_envs * -(-steps // row) // train.num_minibatches)
    if train.recurrent_mode == "none":
        return RolloutBuffer(num_envs * steps, batch_size, storage=_storage(cfg, num_envs * steps))
    if train.recurrent_mode == "episode":
        rows = num_envs + 2 * -(-num_envs * steps // row)
        return EpisodeBuffer(num_envs * steps, row, batch_size, num_envs=num_envs, storage=_storage(cfg, rows))
    stride = steps if row == steps else train.state_stride or row
    dtype = None if train.state_dtype == "float32" else getattr(torch, train.state_dtype)
    return RecurrentRolloutBuffer(
        num_envs * steps,
        row,
        batch_size,
        num_envs=num_envs,
        burn_in=train.burn_in,
        state_stride=stride,
        state_dtype=dtype,
        start_state=train.start_state,
        storage=_storage(cfg, num_envs * -(-steps // min(stride, row * -(-steps // row)))),
    )


def _storage(cfg: DictConfig, rows: int) -> LazyTensorStorage:
    if cfg.train.storage == "memmap":
        return LazyMemmapStorage(rows)
    return LazyTensorStorage(rows, device=resolve_device(cfg.train.device) if cfg.train.storage == "device" else "cpu")


def _row_length(cfg: DictConfig, steps: int, env: EnvBase) -> int:
    mode = cfg.train.recurrent_mode
    if mode == "none":
        return 1
    if mode == "episode":  # no episode takes more of a rollout than either
        return min(steps, episode_attribute(env, "max_episode_steps") or steps)
    return min(steps, cfg.train.seq_len or steps)
