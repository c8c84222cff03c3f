"""Environments."""

from cyborg_torchrl.envs.assoc_recall import AssocRecallEnv
from cyborg_torchrl.envs.delayed_cue import DelayedCueEnv, memoryless_policy, oracle_policy
from cyborg_torchrl.envs.gymnasium_env import build_gymnasium
from cyborg_torchrl.envs.public_benchmarks import build_bsuite, build_memory_gym, build_minigrid, build_popgym

__all__ = [
    "AssocRecallEnv",
    "DelayedCueEnv",
    "build_bsuite",
    "build_gymnasium",
    "build_memory_gym",
    "build_minigrid",
    "build_popgym",
    "memoryless_policy",
    "oracle_policy",
]
