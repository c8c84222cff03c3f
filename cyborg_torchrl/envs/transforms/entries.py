"""The base of our transforms: they work on tensordicts, and on plain dictionaries of tensors."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import Transform

Entries = MutableMapping[Any, Tensor]
"""A tensordict, or a dictionary with unravelled keys."""


class EntryTransform(Transform):
    """A transform that reads and writes entries by their keys, and nothing else of the tensordict.

    So the collectors can call it on dictionaries, which takes a fraction of the time. A subclass overrides the two
    methods below, and not `_step` and `_reset`.
    """

    def after_step(self, before: Entries, after: Entries) -> None:
        """Change the entries after a step, in place.

        Args:
            before: the entries before the step, the action among them; not to be changed.
            after: the entries after the step.
        """

    def after_reset(self, begun: Entries, is_reset: Tensor | None) -> None:
        """Change the entries after a reset, in place. Those of environments that were not reset do not count.

        Args:
            begun: the entries of all environments.
            is_reset: the environments that were reset, [*N] or [*N, 1] bool; None: all.
        """

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        self.after_step(tensordict, next_tensordict)
        return next_tensordict

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        self.after_reset(tensordict_reset, tensordict.get("_reset", None))
        return tensordict_reset
