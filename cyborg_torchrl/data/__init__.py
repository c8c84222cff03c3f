"""Rollouts and rollout buffers."""

from cyborg_torchrl.data.recurrent_buffer import EpisodeBuffer, RecurrentRolloutBuffer
from cyborg_torchrl.data.rollout import Rollout
from cyborg_torchrl.data.rollout_buffer import RolloutBuffer

__all__ = ["EpisodeBuffer", "RecurrentRolloutBuffer", "Rollout", "RolloutBuffer"]
