"""POPGym's Battleship: find hidden ships."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.data import Categorical, MultiCategorical

from cyborg_torchrl.envs.popgym.base import Entries, Outcome, PopgymEnv, Spaces

SHIPS = (2, 3, 3, 4)
"""Lengths of the ships."""


class BattleshipEnv(PopgymEnv):
    """Battleship: four ships of 2, 3, 3 and 4 cells are hidden on a board, and a shot is a hit or a miss.

    - Observation, [N] integer: 1 if the last shot was a hit, else 0; 0 at first.
    - Action, [N, 2] integer: row and column of the shot.
    - Reward: 1 / 12 for a hit, -1 / (cells - 12) for a miss. A cell that was shot at before is a miss.
    - The last hit terminates the episode. It is truncated after as many steps as the board has cells; both may be true.

    | level | board |
    |---|---|
    | Easy | 8 x 8 |
    | Medium | 10 x 10 |
    | Hard | 12 x 12 |

    Ships are placed one after the other, each with equal chances on all places that are free. The observation has no
    action in it, so memory needs the previous action (`transforms.previous_action`).
    """

    levels = {"Easy": {"side": 8}, "Medium": {"side": 10}, "Hard": {"side": 12}}
    side: int

    def spaces(self) -> Spaces:
        """Return the specs and the length that follow from the level."""
        return Spaces(Categorical(2), MultiCategorical([self.side, self.side]), self.side**2)

    def _prepare_tables(self) -> None:
        cells, needed = self.side**2, sum(SHIPS)
        self._rewards = self._constant(-1 / (cells - needed), 1 / needed)
        self._first_cell = self._first(cells)
        self._none_left = torch.tensor(0, device=self.device)
        self._places = {length: _places(self.side, length).to(self.device) for length in set(SHIPS)}

    def _draw(self, count: int) -> Entries:
        board = torch.zeros(count, self.side**2, device=self.device)
        for length in SHIPS:
            places = self._places[length]
            is_free = board @ places.T == 0
            chance = torch.rand(is_free.shape, generator=self._generator, device=self.device)
            board += places[torch.where(is_free, chance, -1.0).argmax(-1)]
        return {"board": board.long()}

    def _prepare(self, drawn: Entries) -> Entries:
        board = drawn["board"]
        left = board.new_full((len(board), 1), sum(SHIPS))
        return {"ship": board.clone(), "left": left, "observation": board.new_zeros(len(board))}

    def _play(self, action: Tensor, entries: Entries) -> Outcome:
        row, column = action.unbind(1)
        cell = torch.add(self._first_cell + column, row, alpha=self.side)
        entries["observation"] = hit = entries["ship"].take(cell)
        entries["ship"].view(-1).index_fill_(0, cell, 0)  # a second shot is a miss
        hit = hit.unsqueeze(-1)
        entries["left"] = left = entries["left"] - hit
        return Outcome(self._rewards.take(hit), left == self._none_left)


def _places(side: int, length: int) -> Tensor:
    """Return all places of a ship on a board, [P, side * side] float with ones in its cells."""
    board = torch.zeros(2, side, side - length + 1, side, side)
    for row in range(side):
        for column in range(side - length + 1):
            board[0, row, column, row, column : column + length] = 1.0
            board[1, row, column, column : column + length, row] = 1.0
    return board.view(-1, side * side)
