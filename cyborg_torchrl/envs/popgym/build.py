"""POPGym's ids and the native environments that they name."""

from __future__ import annotations

import torch

from cyborg_torchrl.envs.popgym.autoencode import AutoencodeEnv
from cyborg_torchrl.envs.popgym.base import PopgymEnv
from cyborg_torchrl.envs.popgym.battleship import BattleshipEnv
from cyborg_torchrl.envs.popgym.cartpole import (
    NoisyPositionOnlyCartPoleEnv,
    PositionOnlyCartPoleEnv,
    VelocityOnlyCartPoleEnv,
)
from cyborg_torchrl.envs.popgym.concentration import ConcentrationEnv
from cyborg_torchrl.envs.popgym.count_recall import CountRecallEnv
from cyborg_torchrl.envs.popgym.higher_lower import HigherLowerEnv
from cyborg_torchrl.envs.popgym.labyrinth import LabyrinthEscapeEnv, LabyrinthExploreEnv
from cyborg_torchrl.envs.popgym.minesweeper import MineSweeperEnv
from cyborg_torchrl.envs.popgym.multiarmed_bandit import MultiarmedBanditEnv
from cyborg_torchrl.envs.popgym.pendulum import NoisyPositionOnlyPendulumEnv, PositionOnlyPendulumEnv
from cyborg_torchrl.envs.popgym.repeat_first import RepeatFirstEnv
from cyborg_torchrl.envs.popgym.repeat_previous import RepeatPreviousEnv

FAMILIES: dict[str, type[PopgymEnv]] = {
    "Autoencode": AutoencodeEnv,
    "Battleship": BattleshipEnv,
    "Concentration": ConcentrationEnv,
    "CountRecall": CountRecallEnv,
    "HigherLower": HigherLowerEnv,
    "LabyrinthEscape": LabyrinthEscapeEnv,
    "LabyrinthExplore": LabyrinthExploreEnv,
    "MineSweeper": MineSweeperEnv,
    "MultiarmedBandit": MultiarmedBanditEnv,
    "NoisyPositionOnlyCartPole": NoisyPositionOnlyCartPoleEnv,
    "NoisyPositionOnlyPendulum": NoisyPositionOnlyPendulumEnv,
    "PositionOnlyCartPole": PositionOnlyCartPoleEnv,
    "PositionOnlyPendulum": PositionOnlyPendulumEnv,
    "RepeatFirst": RepeatFirstEnv,
    "RepeatPrevious": RepeatPreviousEnv,
    "VelocityOnlyCartpole": VelocityOnlyCartPoleEnv,  # popgym spells this id so
}
"""Families by their names in ids."""


def native_ids() -> dict[str, tuple[type[PopgymEnv], str]]:
    """Return the family and the level of each id that has a native environment, such as "popgym-CountRecallEasy-v0"."""
    return {f"popgym-{name}{level}-v0": (family, level) for name, family in FAMILIES.items() for level in family.levels}


def build_native(
    id: str,
    num_envs: int,
    *,
    fixed: bool = False,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> PopgymEnv:
    """Build the native environment of an id.

    Args:
        id: a key of `native_ids()`.
        num_envs: number of environments.
        fixed: mend the faults of popgym that the family's docstring lists.
        device: device of all tensors.
        seed: seed of the episodes; None draws one from torch's generator.
    """
    family, level = native_ids()[id]
    return family(num_envs, level=level, fixed=fixed, device=device, seed=seed)


def native_steps(id: str) -> int:
    """Return the steps of the longest episode of an id, a key of `native_ids()`."""
    return build_native(id, 1, seed=0).max_episode_steps
