"""Build all parts of a training run, or one rank's share of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torchrl.envs import EnvBase

from cyborg_torchrl.collectors.runtime import prepare_cpu
from cyborg_torchrl.config import ConfigError, TrainConfig
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.training.builders.agent import build_agent, build_loss
from cyborg_torchrl.training.builders.buffer import build_buffer, rollout_length
from cyborg_torchrl.training.builders.collector import build_collector
from cyborg_torchrl.training.builders.environment import build_env
from cyborg_torchrl.training.distributed import Ranks
from cyborg_torchrl.training.trainer import PPOTrainer

RANK_SEEDS = 10_007
"""Difference between the seeds of two ranks, larger than the number of workers of one rank."""


class Training(NamedTuple):
    """The parts of a training run."""

    trainer: PPOTrainer
    agent: PPOAgent
    env: EnvBase


def prepare_process(cfg: DictConfig) -> None:
    """Set this process's threads and allocator as configured, and flush denormals.

    For programs: `build_trainer` and `run_experiment` leave the process as it is.
    """
    prepare_cpu(cfg.train.num_threads)


def share_of_rank(cfg: DictConfig, ranks: Ranks) -> DictConfig:
    """Return the configuration of one rank: its part of the environments and steps, and its seed.

    Raises:
        ConfigError: if environments, or their worker processes, cannot be shared evenly.
    """
    if ranks.size == 1:
        return cfg
    cfg = copy.deepcopy(cfg)
    for key, number in (("num_envs", cfg.env.get("num_envs", 1)), ("workers", cfg.env.get("workers") or 0)):
        if number % ranks.size:
            nearest = max(1, round(number / ranks.size)) * ranks.size
            raise ConfigError(
                f"env.{key} = {number} cannot be shared evenly by the {ranks.size} processes of this run; the nearest "
                f"that can is {nearest}."
            )
        if key in cfg.env:
            cfg.env[key] = number // ranks.size
    cfg.train.total_timesteps = max(1, cfg.train.total_timesteps // ranks.size)
    cfg.train.seed += ranks.rank * RANK_SEEDS
    return cfg


def build_trainer(
    cfg: DictConfig, on_progress: Callable[[float], None] = lambda share: None, ranks: Ranks | None = None
) -> Training:
    """Build the trainer, its agent and its environment.

    Seeds torch's global generator by `torch.manual_seed(cfg.train.seed)`, so that parameters and actions are
    reproducible. Changes nothing else of the process: threads and denormals are set by `prepare_process`.

    Args:
        cfg: the configuration of the whole run.
        on_progress: see `PPOTrainer`.
        ranks: the processes that train together, each with its share; None: this process alone.

    Raises:
        ConfigError: if a part refuses its options, or the parts do not fit together.
    """
    ranks = ranks or Ranks()
    cfg = share_of_rank(cfg, ranks)
    torch.manual_seed(cfg.train.seed)
    env = build_env(cfg)
    agent = build_agent(cfg, env)
    steps = rollout_length(cfg, env)
    buffer = build_buffer(cfg, env, steps)
    trainer = PPOTrainer(
        collector=build_collector(cfg, env, agent, steps, buffer),
        loss=build_loss(cfg, agent),
        value_operator=agent.get_value_operator(),
        buffer=buffer,
        config=cast("TrainConfig", OmegaConf.to_object(cfg.train)),
        on_progress=on_progress,
        ranks=ranks,
    )
    return Training(trainer, agent, env)
