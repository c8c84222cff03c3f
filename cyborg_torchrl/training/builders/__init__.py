"""Build the parts of a run from its configuration."""

from cyborg_torchrl.training.builders.agent import build_agent, build_core, build_loss, memory_horizon
from cyborg_torchrl.training.builders.buffer import Buffer, build_buffer, rollout_length
from cyborg_torchrl.training.builders.collector import build_collector
from cyborg_torchrl.training.builders.environment import build_env
from cyborg_torchrl.training.builders.trainer import Training, build_trainer, prepare_process, share_of_rank

__all__ = [
    "Buffer",
    "Training",
    "build_agent",
    "build_buffer",
    "build_collector",
    "build_core",
    "build_env",
    "build_loss",
    "build_trainer",
    "memory_horizon",
    "prepare_process",
    "rollout_length",
    "share_of_rank",
]
