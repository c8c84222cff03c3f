"""Training: the trainer, builders, runs with checkpoints, evaluation."""

from cyborg_torchrl.training.builders import (
    Training,
    build_agent,
    build_buffer,
    build_collector,
    build_core,
    build_env,
    build_loss,
    build_trainer,
    prepare_process,
    rollout_length,
)
from cyborg_torchrl.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from cyborg_torchrl.training.distributed import Ranks, joined_ranks
from cyborg_torchrl.training.evaluation import Evaluation, evaluate
from cyborg_torchrl.training.experiment import StoppedError, evaluate_agent, run_experiment
from cyborg_torchrl.training.loading import LoadedAgent, build_acting_env, load_agent
from cyborg_torchrl.training.stats import Interval, mean_interval, success_interval
from cyborg_torchrl.training.trainer import PPOTrainer

__all__ = [
    "CheckpointError",
    "Evaluation",
    "Interval",
    "LoadedAgent",
    "PPOTrainer",
    "Ranks",
    "StoppedError",
    "Training",
    "build_acting_env",
    "build_agent",
    "build_buffer",
    "build_collector",
    "build_core",
    "build_env",
    "build_loss",
    "build_trainer",
    "evaluate",
    "evaluate_agent",
    "joined_ranks",
    "load_agent",
    "load_checkpoint",
    "mean_interval",
    "prepare_process",
    "rollout_length",
    "run_experiment",
    "save_checkpoint",
    "success_interval",
]
