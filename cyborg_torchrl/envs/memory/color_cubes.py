"""`color_cubes`: find cubes by their colours on a grid, while other cubes move and are seen only when they do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cyborg_torchrl.envs.memory.rewriting import RewritingTask
from cyborg_torchrl.envs.memory.task import Latents, Level, Memory, Sizes, at, check_least, one_hot, recall
from cyborg_torchrl.registry import register_environment

UP, DOWN, LEFT, RIGHT, INTERACT = range(5)
STEPS_PER_ROW = 4
"""Steps that a phase may take for each row of the grid."""


@register_environment("color_cubes")
class ColorCubesEnv(RewritingTask):
    """Color-Cubes, as a batch of episodes on one device.

    There are cubes of different colours on a grid. Each phase names the colour of a target. The agent walks to the
    target and interacts with it: the target teleports to a free cell, and the next phase begins with another colour.
    Meanwhile other cubes teleport at random. The agent sees all cubes at the first step, and again whenever one of them
    has teleported. It never sees them otherwise. An interaction at another cell ends the episode. So do the last target
    and the time limit.

    - Observation, [N, 2 grid + 2 grid cubes + cubes + 1] float, in this order: row and column of the agent, each as
      one-hot. Row and column of each cube, if cubes are shown. The colour of the target as one-hot, when a phase
      begins. The colour flag. The cubes are in the order of their colours if the flag is set, and in reading order
      otherwise.
    - Action, [N] integer: 0 up, 1 down, 2 left, 3 right, 4 interact. A move into a wall changes nothing.
    - Reward: +1 for an interaction with the target, 0 for another interaction, -0.01 for each other step.
    - "success", [N, 1] float: 1 if the agent finished all phases.

    The levels are trivial (one cube, one phase), medium (three cubes), and extreme. In `extreme` colours are shown only
    at the first step, so the agent must conclude from each update which cube has moved.

    Chance is 1 / grid ** 2 for one phase, for an agent that interacts in the middle of the grid.

    Args:
        num_envs: N, number of environments.
        cubes: number of cubes, 1 or more; None: the level's.
        phases: number of targets, 1 or more; None: as many as cubes.
        grid: rows and columns of the grid, 2 or more.
        teleport: probability that a cube other than the target teleports in a step.
        hide_colours: hide the colours after the first step; None: only in `extreme`.
        horizon: steps at the start of each phase in which actions are ignored, 0 or more; None: the level's.
        level: trivial (the default), medium or extreme.
        device: device of all tensors.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or not an integer, or the level is unknown.

    Source: Shchendrigin et al. (2026), arXiv 2601.15086: phases, targets, teleports, updates after events, +1 for a
    target, one cube and one target in Trivial, positions without colours in Extreme. We could not read the whole paper.
    Ours are all numbers, the action for interactions, their other rewards, the time limit, at most one teleport a step,
    the entries of an observation, and `horizon`. A figure of the paper shows three cubes on a grid of five. Results are
    not comparable.
    """

    levels = {"trivial": Level(0, 1, 0.95), "medium": Level(0, 3, 0.90), "extreme": Level(0, 3, 0.80)}
    default = levels["trivial"]
    cubes: int
    grid: int
    measure = "cubes"
    mistake = 0.0  # or agents learn never to interact, long before one of them finds a target
    least = {"cubes": 1, "grid": 2, "horizon": 0}

    def __init__(
        self,
        num_envs: int = 64,
        *,
        cubes: int | None = None,
        phases: int | None = None,
        grid: int = 5,
        teleport: float = 0.2,
        hide_colours: bool | None = None,
        level: str | None = None,
        **shared: Any,
    ) -> None:
        if phases is not None:
            check_least("phases", phases, 1)
        if not 0 <= teleport <= 1:
            raise ValueError(f"teleport must be from 0 to 1; got {teleport}.")
        self._phases, self.teleport = phases, teleport
        self.hide_colours = level == "extreme" if hide_colours is None else hide_colours
        super().__init__(num_envs, {"cubes": cubes, "grid": grid}, level=level, **shared)

    def sizes(self) -> Sizes:
        """Return the sizes that follow from the options."""
        cells, phases = self.grid**2, self.cubes if self._phases is None else self._phases
        if self.cubes > cells - 2:  # one cell for the agent, and one to teleport to
            raise ValueError(f"cubes must be <= grid ** 2 - 2 = {cells - 2}; got {self.cubes}.")
        features = 2 * self.grid * (self.cubes + 1) + self.cubes + 1
        return Sizes(features, actions=5, answers=phases, steps=phases * (self.horizon + STEPS_PER_ROW * self.grid))

    def _draw(self) -> Latents:
        cells = self.permutations(self.grid**2, self.cubes + 1)
        is_shown = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        shape = (self.num_envs, self.max_episode_steps, 4)
        return {
            "agent": cells[:, 0],
            "cube": cells[:, 1:],
            "target": self.randint(self.cubes),
            "wait": torch.full_like(self._time, self.horizon),
            "is_update": is_shown,
            "is_phase": is_shown,
            # For each step: whether a cube teleports, which, and where to; and the next target.
            "luck": torch.rand(shape, generator=self._generator, device=self.device),
        }

    def _show(self, time: Tensor, latents: Latents) -> Tensor:
        agent, cube, is_update = latents["agent"], latents["cube"], latents["is_update"]
        has_colours = is_update & ((time == 0) | (not self.hide_colours))
        cube = torch.where(has_colours.unsqueeze(-1), cube, cube.sort(-1).values)
        return torch.cat(
            [
                self._row_and_column(agent),
                (self._row_and_column(cube) * is_update[:, None, None]).flatten(1),
                one_hot(latents["target"], self.cubes, latents["is_phase"]),
                has_colours.float().unsqueeze(-1),
            ],
            -1,
        )

    def _act(self, action: Tensor, time: Tensor, latents: Latents) -> tuple[Tensor, Tensor]:
        target, cube, can_act = latents["target"], latents["cube"], latents["wait"] == 0
        is_answer = can_act & (action == INTERACT)
        is_right = is_answer & (latents["agent"] == at(cube, target))
        agent = torch.where(can_act, self._moved(latents["agent"], action), latents["agent"])
        index = time.clamp(max=self.max_episode_steps - 1)
        event, which, place, following = latents["luck"][torch.arange(self.num_envs, device=self.device), index].T
        is_teleport = ~is_answer & (event < self.teleport) & (self.cubes > 1)
        mover = torch.where(is_right, target, self._other(which, target))
        is_moving = (one_hot(mover, self.cubes) > 0) & (is_right | is_teleport).unsqueeze(-1)
        latents.update(
            agent=agent,
            cube=torch.where(is_moving, self._free(place, agent, cube).unsqueeze(-1), cube),
            target=torch.where(is_right, self._other(following, target), target),
            wait=torch.where(is_right, self.horizon, (latents["wait"] - 1).clamp(min=0)),
            is_update=is_right | is_teleport,
            is_phase=is_right,
        )
        return is_answer, is_right

    def _row_and_column(self, cell: Tensor) -> Tensor:
        """Return the rows and columns of cells [*B], each as one-hot, [*B, 2 grid]."""
        return torch.cat([one_hot(cell // self.grid, self.grid), one_hot(cell % self.grid, self.grid)], -1)

    def _moved(self, cell: Tensor, action: Tensor) -> Tensor:
        """Return the cells [N] after the moves [N]."""
        last = self.grid - 1
        row = (cell // self.grid + (action == DOWN).long() - (action == UP).long()).clamp(0, last)
        column = (cell % self.grid + (action == RIGHT).long() - (action == LEFT).long()).clamp(0, last)
        return row * self.grid + column

    def _other(self, draw: Tensor, target: Tensor) -> Tensor:
        """Return cubes [N] other than the targets [N], from draws in [0, 1); of one cube, that cube."""
        other = (draw * (self.cubes - 1)).long()
        return (other + (other >= target).long()).clamp(max=self.cubes - 1)

    def _free(self, draw: Tensor, agent: Tensor, cube: Tensor) -> Tensor:
        """Return cells [N] without cube or agent, from draws in [0, 1)."""
        taken = one_hot(torch.cat([cube, agent.unsqueeze(-1)], -1), self.grid**2).sum(1)
        num_free = (taken == 0).cumsum(-1)
        rank = (draw * num_free[:, -1]).long().minimum(num_free[:, -1] - 1)  # a product may be rounded up
        return (num_free <= rank.unsqueeze(-1)).sum(-1)

    def _oracle(self, observation: Tensor, memory: Memory) -> Tensor:
        sizes = (2 * self.grid, 2 * self.grid * self.cubes, self.cubes, 1)
        _, shown, named, has_colours = observation.split(sizes, -1)
        seen = self._cells(shown.unflatten(-1, (self.cubes, -1)))
        cube = recall(memory, "cube", torch.zeros_like(seen))
        is_same = cube.unsqueeze(-1) == seen.unsqueeze(-2)  # [N, remembered, seen]
        new = (seen * ~is_same.any(-2)).sum(-1, keepdim=True)
        concluded = torch.where(is_same.any(-1), cube, new)
        cube = torch.where(shown.any(-1, keepdim=True), concluded, cube)
        cube = memory["cube"] = torch.where(has_colours > 0, seen, cube)
        target = recall(memory, "target", torch.zeros_like(cube[:, 0]))
        target = memory["target"] = torch.where(named.any(-1), named.argmax(-1), target)
        return self._towards(observation, at(cube, target))

    def _memoryless(self, observation: Tensor, memory: Memory) -> Tensor:
        """Return the action of a walk to the middle, then interact: right by chance, 1 / grid ** 2, in one phase."""
        middle = torch.full(observation.shape[:-1], self.grid**2 // 2, device=observation.device)
        return self._towards(observation, middle)

    def _cells(self, shown: Tensor) -> Tensor:
        """Return the cells [*B] of rows and columns, each as one-hot, [*B, 2 grid]."""
        row, column = shown.split(self.grid, -1)
        return row.argmax(-1) * self.grid + column.argmax(-1)

    def _towards(self, observation: Tensor, goal: Tensor) -> Tensor:
        """Return the actions [N] that walk to the cells [N], first to the row, and interact there."""
        agent = self._cells(observation[..., : 2 * self.grid])
        rows, columns = goal // self.grid - agent // self.grid, goal % self.grid - agent % self.grid
        action = torch.where(columns == 0, INTERACT, torch.where(columns > 0, RIGHT, LEFT))
        return torch.where(rows == 0, action, torch.where(rows > 0, DOWN, UP))
