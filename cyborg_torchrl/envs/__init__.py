"""Environments."""

from cyborg_torchrl.envs.delayed_cue import DelayedCueEnv, memoryless_policy, oracle_policy

__all__ = ["DelayedCueEnv", "memoryless_policy", "oracle_policy"]
