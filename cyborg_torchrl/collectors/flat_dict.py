"""What is there at one step of a rollout, flat, and how the steps of a rollout are put side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from cyborg_torchrl import keys

Entries = dict[NestedKey, Tensor]
"""A tensordict, flat: (unravelled) keys to tensors."""
Call = Callable[[Entries], None]
"""Reads some entries and writes others."""


def flat(tensordict: TensorDictBase) -> Entries:
    """The leaves of a tensordict."""
    return {unravel_key(key): value for key, value in tensordict.items(True, True)}


class NotFusable(Exception):
    """Why something cannot be run on tensors alone."""


STACKED = 16
"""Steps that are kept apart before they are put side by side: few enough to be still in the cache by then."""


class Columns:
    """Entries of the steps of a rollout, put side by side as they come.

    Args:
        steps: T.
        tensors: where they go, [N, T, ...] each, by key, in memory time first; what is not there yet is allocated.
    """

    def __init__(self, steps: int, tensors: Entries | None = None) -> None:
        self.tensors: Entries = {} if tensors is None else tensors
        self._steps, self._begin = steps, 0
        self._before: dict[NestedKey, list[Tensor]] = defaultdict(list)
        self._after: dict[NestedKey, list[Tensor]] = defaultdict(list)

    def append(self, before: Iterable[tuple[NestedKey, Tensor]], after: Iterable[tuple[NestedKey, Tensor]]) -> None:
        """Takes the entries of one step: those before it, written by the policy or not, and those after it."""
        for rows, entries in ((self._before, before), (self._after, after)):
            for key, value in entries:
                rows[key].append(value)
        count = len(self._before[keys.ACTION])
        if count == STACKED or self._begin + count == self._steps:
            for key, rows in self._before.items():
                self._put(key, rows)
            for key, rows in self._after.items():
                self._put((keys.NEXT, *key) if isinstance(key, tuple) else (keys.NEXT, key), rows)
            self._begin += count

    def _put(self, key: NestedKey, rows: list[Tensor]) -> None:
        first = rows[0]
        if key not in self.tensors:
            # in memory one step after the other, which is how they come
            self.tensors[key] = first.new_empty(self._steps, *first.shape).transpose(0, 1)
        torch.stack(rows, 0, out=self.tensors[key].transpose(0, 1)[self._begin : self._begin + len(rows)])
        rows.clear()
