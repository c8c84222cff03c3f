"""TorchRL components for reinforcement learning with memory."""

from cyborg_torchrl import keys
from cyborg_torchrl.checks import check_recurrent
from cyborg_torchrl.collectors import FusedCollector, RolloutCollector
from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.data import EpisodeBuffer, RecurrentRolloutBuffer, Rollout, RolloutBuffer
from cyborg_torchrl.envs import DelayedCueEnv, make_env
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.objectives import RecurrentClipPPOLoss, add_advantages
from cyborg_torchrl.registry import register_backbone, register_environment
from cyborg_torchrl.training.evaluation import Evaluation, evaluate
from cyborg_torchrl.training.trainer import PPOTrainer

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "ConfigError",
    "DelayedCueEnv",
    "EpisodeBuffer",
    "Evaluation",
    "FusedCollector",
    "PPOAgent",
    "PPOTrainer",
    "RecurrentClipPPOLoss",
    "RecurrentRolloutBuffer",
    "Rollout",
    "RolloutBuffer",
    "RolloutCollector",
    "add_advantages",
    "build_encoder",
    "check_recurrent",
    "evaluate",
    "keys",
    "load_config",
    "make_env",
    "register_backbone",
    "register_environment",
]
