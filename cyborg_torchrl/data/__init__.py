"""Rollouts and rollout buffers."""

from cyborg_torchrl.data.episode_buffer import EpisodeBuffer
from cyborg_torchrl.data.recurrent_buffer import RecurrentRolloutBuffer
from cyborg_torchrl.data.rollout import Rollout
from cyborg_torchrl.data.rollout_buffer import RolloutBuffer

__all__ = ["EpisodeBuffer", "RecurrentRolloutBuffer", "Rollout", "RolloutBuffer"]
