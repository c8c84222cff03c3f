"""Crafter with wood as its reward, "Crafter collect-wood", as a gymnasium environment. It is not MineRL Treechop."""

from __future__ import annotations

from collections import deque
from typing import Any, SupportsInt

import gymnasium
import numpy as np

from cyborg_torchrl import keys
from cyborg_torchrl.registry import UnavailableError, check_known

SIZE = 64
TABLES = {"all": None, "chop": ("noop", "move_left", "move_right", "move_up", "move_down", "do")}
"""Tables of actions by Crafter's names; None: all 17. `chop` drops sleeping, placing and making."""
VITALS = ("health", "food", "drink", "energy")


class CrafterWood(gymnasium.Env[Any, Any]):
    """Crafter (2-D, 17 actions) with a reward of 1 for each collected wood and no other reward.

    Wood is counted by Crafter's achievement `collect_wood`, since the inventory holds at most 9. A felled tree becomes
    grass, and a world has about 200 trees. Health at zero terminates; `max_episode_steps` truncates.

    - Observation: {"pixels": [64, 64, 3] uint8}, the map around the player and the inventory.
    - Action: a row of the table; "do" fells the tree that the player faces.

    Args:
        actions: name of a table of actions.
        max_episode_steps: steps of an episode (Crafter's limit is 10,000).
        mortal: True for Crafter's rules. False: health, food, drink and energy are refilled before each step, so every
            episode lasts `max_episode_steps`. In Crafter, players starve after about 200 to 400 steps unless they eat
            and drink.
        regrow: steps after which a felled tree grows again, as soon as its place is free; None: never, as in Crafter.

    Raises:
        ValueError: if there is no such table.
        UnavailableError: if crafter is missing.

    Source: Hafner (2022), "Benchmarking the Spectrum of Agent Capabilities"; crafter 1.8.3.
    """

    observation_space = gymnasium.spaces.Dict({keys.PIXELS: gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)})

    def __init__(
        self, actions: str = "all", max_episode_steps: int = 8000, *, mortal: bool = True, regrow: int | None = None
    ) -> None:
        check_known("actions", actions, TABLES)
        self.max_episode_steps, self.mortal, self.regrow = max_episode_steps, mortal, regrow
        self._stumps: deque[tuple[int, tuple[int, int]]] = deque()
        self._game = make_game()
        every = list(self._game.action_names)
        self.action_names = TABLES[actions] or tuple(every)
        self._actions = [every.index(name) for name in self.action_names]
        self.action_space = gymnasium.spaces.Discrete(len(self._actions))
        self._steps = self._wood = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode in a new world. A seed restarts Crafter's stream of worlds."""
        super().reset(seed=seed, options=options)
        if seed is not None:
            self._game = make_game(seed)
        self._steps = self._wood = 0
        self._stumps.clear()
        return _observed(self._game.reset()), {}

    def step(self, action: SupportsInt) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Take a step. Return the observation, the wood, whether the player died, whether time is up, and no info."""
        if not self.mortal:
            self._game._player.inventory.update(dict.fromkeys(VITALS, 9))
        if self._stumps and self._stumps[0][0] <= self._steps:
            self._grow(self._stumps.popleft()[1])
        pixels, _, _, info = self._game.step(self._actions[int(action)])
        self._steps += 1
        wood, before = info["achievements"]["collect_wood"], self._wood
        self._wood = wood
        if self.regrow is not None and wood > before:
            player = self._game._player
            stump = (int(player.pos[0] + player.facing[0]), int(player.pos[1] + player.facing[1]))
            self._stumps.append((self._steps + self.regrow, stump))
        is_dead = self.mortal and info["discount"] == 0
        is_cut = self._steps >= self.max_episode_steps and not is_dead
        return _observed(pixels), float(wood - before), is_dead, is_cut, {}

    def _grow(self, stump: tuple[int, int]) -> None:
        """Regrow a tree, or try again later if its place is occupied."""
        material, occupant = self._game._world[stump]
        if occupant is not None:
            self._stumps.append((self._steps + (self.regrow or 0), stump))
        elif material == "grass":  # otherwise something was built there
            self._game._world[stump] = "tree"


def make_game(seed: int | None = None) -> Any:
    """Build Crafter without its time limit.

    Raises:
        UnavailableError: if crafter is missing.
    """
    try:
        import crafter
    except ImportError as error:
        command = "pip install 'cyborg-torchrl[benchmarks]'"
        raise UnavailableError(f"backend=crafter needs {error.name}: {command}") from None
    return crafter.Env(size=(SIZE, SIZE), length=0, seed=seed)


def _observed(pixels: np.ndarray) -> dict[str, np.ndarray]:
    return {keys.PIXELS: np.ascontiguousarray(pixels)}
