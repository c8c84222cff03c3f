"""Rollout buffers."""

from cyborg_torchrl.data.rollout_buffer import RecurrentRolloutBuffer, RolloutBuffer

__all__ = ["RecurrentRolloutBuffer", "RolloutBuffer"]
