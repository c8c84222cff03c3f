"""POPGym's MineSweeper: open all cells that have no mine."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.data import Categorical, MultiCategorical

from cyborg_torchrl.envs.popgym.base import Entries, Outcome, PopgymEnv, Spaces

CLEAR, MINE, OPENED = 0, 1, 2
"""Kinds of cells."""


class MineSweeperEnv(PopgymEnv):
    """MineSweeper: opening a cell shows how many mines are in the 3 x 3 cells around it, itself included.

    - Observation, [N] integer: the number of mines around the last cell; 0 at first.
    - Action, [N, 2] integer: row and column of the cell to open.
    - Reward, with C cells without a mine: 1 / C for a new cell, -0.5 / (C - 2) for one that is open already, and
      -0.5 - 1 / C for a mine.
    - A mine terminates the episode, and so does the last cell without a mine. It is truncated after C steps, but never
      terminated and truncated at once.

    | level | board | mines |
    |---|---|---|
    | Easy | 4 x 4 | 2 |
    | Medium | 6 x 6 | 6 |
    | Hard | 8 x 8 | 10 |

    There are as many steps as cells without a mine. So who opens a cell twice cannot win any more, as in popgym.
    """

    levels = {
        "Easy": {"side": 4, "mines": 2},
        "Medium": {"side": 6, "mines": 6},
        "Hard": {"side": 8, "mines": 10},
    }
    rounds = 8
    side: int
    mines: int

    def spaces(self) -> Spaces:
        """Return the specs and the length that follow from the level."""
        counts = min(self.mines + 1, 10)
        return Spaces(Categorical(counts), MultiCategorical([self.side, self.side]), self.side**2 - self.mines)

    def _prepare_tables(self) -> None:
        clear = self.side**2 - self.mines
        self._rewards = self._constant(1 / clear, -0.5 - 1 / clear, -0.5 / (clear - 2))
        self._after = torch.tensor([OPENED, MINE, OPENED], device=self.device)
        self._opens = torch.tensor([1, 0, 0], device=self.device)
        self._mine = torch.tensor(MINE, device=self.device)
        self._none_left = torch.tensor(0, device=self.device)
        self._first_cell = self._first(self.side**2)
        cells = torch.arange(self.side**2, device=self.device)
        rows, columns = cells // self.side, cells % self.side
        is_near = ((rows - rows.unsqueeze(1)).abs() <= 1) & ((columns - columns.unsqueeze(1)).abs() <= 1)
        self._near = is_near.float()

    def _draw(self, count: int) -> Entries:
        return {"mines": self._permutations(count, self.side**2)[:, : self.mines]}

    def _prepare(self, drawn: Entries) -> Entries:
        mines = drawn["mines"]
        kind = mines.new_full((len(mines), self.side**2), CLEAR).scatter_(1, mines, MINE)
        return {
            "kind": kind,
            "around": (kind.float() @ self._near).long(),  # all kinds are CLEAR, 0, or MINE, 1
            "left": mines.new_full((len(mines), 1), self.side**2 - self.mines),
            "observation": mines.new_zeros(len(mines)),
        }

    def _play(self, action: Tensor, entries: Entries) -> Outcome:
        row, column = action.unbind(1)
        cell = torch.add(self._first_cell + column, row, alpha=self.side)
        kind = entries["kind"].take(cell)
        entries["kind"].view(-1).index_copy_(0, cell, self._after.take(kind))
        entries["observation"] = entries["around"].take(cell)
        kind = kind.unsqueeze(-1)
        entries["left"] = left = entries["left"] - self._opens.take(kind)
        return Outcome(self._rewards.take(kind), (kind == self._mine) | (left == self._none_left))

    def _ends(self, is_over: Tensor | None, is_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        terminated, truncated, done = super()._ends(is_over, is_last)
        return terminated, truncated if truncated is self._never else truncated & ~terminated, done
