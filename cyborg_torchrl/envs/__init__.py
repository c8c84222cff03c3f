"""Environments."""

from cyborg_torchrl.envs.gym.environment import build_gymnasium
from cyborg_torchrl.envs.gym.public_benchmarks import build_bsuite, build_memory_gym, build_minigrid, build_popgym
from cyborg_torchrl.envs.make import make_env
from cyborg_torchrl.envs.memory.assoc_recall import AssocRecallEnv
from cyborg_torchrl.envs.memory.color_cubes import ColorCubesEnv
from cyborg_torchrl.envs.memory.copy_memory import CopyMemoryEnv
from cyborg_torchrl.envs.memory.delayed_cue import DelayedCueEnv
from cyborg_torchrl.envs.memory.distractor_nav import DistractorNavEnv
from cyborg_torchrl.envs.memory.endless_tmaze import EndlessTMazeEnv
from cyborg_torchrl.envs.memory.multi_cue_delay import MultiCueDelayEnv
from cyborg_torchrl.envs.memory.n_back import NBackEnv
from cyborg_torchrl.envs.memory.pattern_binding import PatternBindingEnv
from cyborg_torchrl.envs.memory.permuted_copy import PermutedCopyEnv
from cyborg_torchrl.envs.memory.task import Level, MemoryTask, memoryless_policy, oracle_policy
from cyborg_torchrl.envs.memory.tmaze import TMazeEnv
from cyborg_torchrl.envs.treechop.treechop import build_treechop

__all__ = [
    "AssocRecallEnv",
    "ColorCubesEnv",
    "CopyMemoryEnv",
    "DelayedCueEnv",
    "DistractorNavEnv",
    "EndlessTMazeEnv",
    "Level",
    "MemoryTask",
    "MultiCueDelayEnv",
    "NBackEnv",
    "PatternBindingEnv",
    "PermutedCopyEnv",
    "TMazeEnv",
    "build_bsuite",
    "build_gymnasium",
    "build_memory_gym",
    "build_minigrid",
    "build_popgym",
    "build_treechop",
    "make_env",
    "memoryless_policy",
    "oracle_policy",
]
