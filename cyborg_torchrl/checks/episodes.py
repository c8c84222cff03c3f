"""Rows of steps as separate episodes, for libraries that run each episode on its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cyborg_torchrl.checks.nested import Tree, map_leaves


class Episodes:
    """The episodes in rows of steps: parts of E episodes, of which the first in a row may continue an older one.

    >>> episodes = Episodes(torch.tensor([[False, False, True], [True, False, False]]))
    >>> episodes.pad(torch.tensor([[1, 2, 3], [4, 5, 6]])).tolist()
    [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    >>> episodes.states(torch.tensor([7, 8])).tolist()
    [7, 0, 0]

    Args:
        is_first: true where a step begins an episode, [B, T] bool.
    """

    def __init__(self, is_first: Tensor) -> None:
        self.shape = is_first.shape
        flat, length = is_first.flatten(), is_first.shape[1]
        is_start = flat | (torch.arange(len(flat)) % length == 0)
        starts = is_start.nonzero().flatten()
        self.starts, self.rows, self.continues = starts, starts // length, ~flat[starts]

    def split(self, values: Tensor) -> list[Tensor]:
        """Return the steps [L, ...] of each episode from values [B, T, ...]."""
        return list(values.flatten(0, 1).tensor_split(self.starts[1:]))

    def pad(self, values: Tensor) -> Tensor:
        """Return values [B, T, ...] by episodes, with zeros after their ends, [E, longest, ...]."""
        return pad_sequence(self.split(values), batch_first=True)

    def join(self, padded: Tensor) -> Tensor:
        """Return values [B, T, ...] from padded episodes [E, longest, ...]."""
        is_step = self.pad(torch.ones(self.shape, dtype=torch.bool))
        return padded[is_step].unflatten(0, self.shape)

    def states(self, state: Tree, dim: int = 0) -> Tree:
        """Return the state before each episode: that of its row if it continues, zeros if it begins.

        Args:
            state: the state before the rows, whose dimension `dim` is the batch B. In the result it is E.
            dim: the batch dimension of each array.
        """

        def each(array: Tensor) -> Tensor:
            shape = [1] * array.ndim
            shape[dim] = -1
            return torch.where(self.continues.view(shape), array.index_select(dim, self.rows), 0)

        return map_leaves(each, state)
