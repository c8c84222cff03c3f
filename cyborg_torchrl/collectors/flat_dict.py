"""Flat dictionaries of tensors, and the writer that joins the steps of a rollout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from cyborg_torchrl import keys

FlatDict = dict[NestedKey, Tensor]
"""The leaves of a tensordict by their unravelled keys."""
Call = Callable[[FlatDict], None]
"""A function that reads some entries and writes others."""


def flat(tensordict: TensorDictBase) -> FlatDict:
    """Return the leaves of a tensordict."""
    return {unravel_key(key): value for key, value in tensordict.items(True, True)}


class NotFusable(Exception):
    """The reason why something cannot run on tensors without tensordicts."""


STEPS_PER_WRITE = 16
"""Steps that are collected before they are written: few enough to be still in the processor's cache."""


class RolloutWriter:
    """Writer of the steps of a rollout into tensors [N, T, ...].

    Args:
        steps: T.
        tensors: the tensors to write to, by key, with time first in memory; missing ones are allocated.
    """

    def __init__(self, steps: int, tensors: FlatDict | None = None) -> None:
        self.tensors: FlatDict = {} if tensors is None else tensors
        self._steps, self._begin = steps, 0
        self._before: dict[NestedKey, list[Tensor]] = defaultdict(list)
        self._after: dict[NestedKey, list[Tensor]] = defaultdict(list)

    def append(self, before: Iterable[tuple[NestedKey, Tensor]], after: Iterable[tuple[NestedKey, Tensor]]) -> None:
        """Add one step: the entries before it, including those of the policy, and the entries after it."""
        # Steps are collected as lists first: one stacked write of many steps is faster than a write for each step.
        for rows, entries in ((self._before, before), (self._after, after)):
            for key, value in entries:
                rows[key].append(value)
        count = len(self._before[keys.ACTION])
        if count == STEPS_PER_WRITE or self._begin + count == self._steps:
            for key, rows in self._before.items():
                self._put(key, rows, count)
            for key, rows in self._after.items():
                self._put(unravel_key((keys.NEXT, key)), rows, count)
            self._begin += count

    def _put(self, key: NestedKey, rows: list[Tensor], count: int) -> None:
        if len(rows) != count:  # otherwise the missing rows would be uninitialised memory
            raise RuntimeError(f"the entry {key!r} was written in {len(rows)} of {count} steps; every step needs it.")
        first = rows[0]
        if key not in self.tensors:
            # Time first in memory, so that each write is one contiguous block.
            self.tensors[key] = first.new_empty(self._steps, *first.shape).transpose(0, 1)
        torch.stack(rows, 0, out=self.tensors[key].transpose(0, 1)[self._begin : self._begin + len(rows)])
        rows.clear()
