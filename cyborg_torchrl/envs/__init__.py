"""Environments."""

from cyborg_torchrl.envs.assoc_recall import AssocRecallEnv
from cyborg_torchrl.envs.delayed_cue import DelayedCueEnv, memoryless_policy, oracle_policy

__all__ = ["AssocRecallEnv", "DelayedCueEnv", "memoryless_policy", "oracle_policy"]
