"""POPGym's mazes: explore a maze, or find the way out of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.data import Categorical, MultiCategorical

from cyborg_torchrl.envs.popgym.base import Entries, Outcome, PopgymEnv, Spaces
from cyborg_torchrl.envs.popgym.maze import FREE, GOAL, START, WALL, draw_mazes

NUM_KINDS, NUM_ACTIONS = 5, 4
"""Kinds of cells in observations, of which one is never seen; directions."""
LONGEST = 1024


class LabyrinthEnv(PopgymEnv):
    """The base of both mazes: an agent moves from cell to cell and sees the 3 x 3 cells around it.

    - Observation, [N, 10] integer: the cells row by row (0 free, 1 wall, 2 start, 3 goal), and the last action, 4 at
      first.
    - Action, [N] integer: left (0), right (1), up (2), down (3). A move into a wall does nothing.
    - The episode is truncated after 1,023 steps.

    | level | cells |
    |---|---|
    | Easy | 11 x 11 |
    | Medium | 15 x 15 |
    | Hard | 19 x 19 |

    popgym has two faults, which `fixed` mends. It truncates one step before its longest episode of 1,024 steps, which
    is `max_episode_steps` here too. Next to the upper or left border, the view is shifted: the missing row or column is
    added as a wall below or to the right, so the agent is not in its middle.
    """

    levels = {"Easy": {"rooms": 5}, "Medium": {"rooms": 7}, "Hard": {"rooms": 9}}
    rounds = 4
    rooms: int

    def spaces(self) -> Spaces:
        """Return the specs and the length that follow from the level."""
        observation = MultiCategorical([NUM_KINDS] * 9 + [NUM_ACTIONS + 1])
        return Spaces(observation, Categorical(NUM_ACTIONS), LONGEST)

    def _prepare_tables(self) -> None:
        self._num_steps = LONGEST if self.fixed else LONGEST - 1
        side = 2 * self.rooms + 1
        moves, views = _moves(side), _views(side, self.fixed)
        self._moves, self._views = moves.view(-1).to(self.device), views.to(self.device)
        self._first_cell = self._first(side**2 + 1)
        self._first_column = self._first_cell.unsqueeze(1)
        self._wall = torch.tensor(WALL, device=self.device)
        self._lost = self._constant(-1 / LONGEST)

    def _draw(self, count: int) -> Entries:
        return draw_mazes(count, self.rooms, self._generator, self._first_cell.device)

    def _prepare(self, drawn: Entries) -> Entries:
        start = drawn["start"]
        grid = self._marked(drawn["grid"].scatter(1, start.unsqueeze(1), START), drawn["end"])
        grid = torch.nn.functional.pad(grid, (0, 1), value=WALL)  # one more cell for views over the border
        view = grid.gather(1, self._views[start])
        no_action = torch.full_like(start, NUM_ACTIONS).unsqueeze(1)
        return {"grid": grid, "cell": start, "observation": torch.cat((view, no_action), 1)}

    def _marked(self, grid: Tensor, end: Tensor) -> Tensor:
        """Return the grids [count, cells] with all marks, given the cells at the end [count]."""
        return grid

    def _move(self, action: Tensor, entries: Entries) -> tuple[Tensor, Tensor]:
        """Move, and observe. Return the flat index in "grid", and the kind of cell that the move led to, [N] each."""
        grid, cell = entries["grid"], entries["cell"]
        target = self._moves.take(torch.add(action, cell, alpha=NUM_ACTIONS))
        kind = grid.take(self._first_cell + target)
        entries["cell"] = cell = torch.where(kind == self._wall, cell, target)
        view = grid.take(self._first_column + self._views.index_select(0, cell))
        entries["observation"] = torch.cat((view, action.unsqueeze(1)), 1)
        return self._first_cell + cell, kind


class LabyrinthEscapeEnv(LabyrinthEnv):
    """LabyrinthEscape: find the exit on the opposite side of the maze.

    - Reward: -1 / 1024 for each step, and 1 more at the exit.
    - The exit terminates the episode.

    Observations, actions and levels are those of `LabyrinthEnv`.
    """

    def _prepare_tables(self) -> None:
        super()._prepare_tables()
        self._goal = torch.tensor(GOAL, device=self.device)
        self._won = self._constant(1 - 1 / LONGEST)

    def _marked(self, grid: Tensor, end: Tensor) -> Tensor:
        return grid.scatter(1, end.unsqueeze(1), GOAL)

    def _play(self, action: Tensor, entries: Entries) -> Outcome:
        _, kind = self._move(action, entries)
        is_over = (kind == self._goal).unsqueeze(1)
        return Outcome(torch.where(is_over, self._won, self._lost), is_over)


class LabyrinthExploreEnv(LabyrinthEnv):
    """LabyrinthExplore: visit all cells of a maze.

    - Reward: 1 / free cells for a new cell, else -1 / 1024.
    - The last new cell terminates the episode; it may be truncated at the same step.

    The maze has no exit. Observations, actions and levels are those of `LabyrinthEnv`.
    """

    def _prepare_tables(self) -> None:
        super()._prepare_tables()
        self._none_left = torch.tensor(0, device=self.device)

    def _prepare(self, drawn: Entries) -> Entries:
        entries = super()._prepare(drawn)
        is_new = (entries["grid"] == FREE).long()
        left = is_new.sum(1, keepdim=True)
        return {**entries, "new": is_new, "left": left, "prize": 1 / left}

    def _play(self, action: Tensor, entries: Entries) -> Outcome:
        cell, _ = self._move(action, entries)
        is_new = entries["new"].take(cell).unsqueeze(1)
        entries["new"].view(-1).index_fill_(0, cell, 0)
        entries["left"] = left = entries["left"] - is_new
        return Outcome(torch.where(is_new.bool(), entries["prize"], self._lost), left == self._none_left)


def _moves(side: int) -> Tensor:
    """Return the cell that each move leads to, [cells, 4]; at the border the same cell."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    less, more = (lambda x: (x - 1).clamp(min=0)), (lambda x: (x + 1).clamp(max=side - 1))
    places = ((row, less(column)), (row, more(column)), (less(row), column), (more(row), column))
    return torch.stack([r * side + c for r, c in places], -1).view(-1, 4)


def _views(side: int, fixed: bool) -> Tensor:
    """Return the cells that are seen from each cell, [cells, 9]; `side * side` where there is a wall instead.

    Args:
        side: rows and columns of the maze.
        fixed: keep the cell in the middle of its view; otherwise a missing row or column is always the last one.
    """
    near = [[i if 0 <= i < side else side for i in (x - 1, x, x + 1)] for x in range(side)]
    if not fixed:
        near = [sorted(seen) for seen in near]
    numbers = torch.arange(side**2).view(side, side)
    numbers = torch.nn.functional.pad(numbers, (0, 1, 0, 1), value=side**2)
    seen = torch.tensor(near)
    return numbers[seen[:, None, :, None], seen[None, :, None, :]].reshape(side**2, 9)
