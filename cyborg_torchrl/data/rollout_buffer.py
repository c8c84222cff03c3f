"""The buffer of agents without memory, and the bases of all rollout buffers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement

from cyborg_torchrl import keys
from cyborg_torchrl.data.rollout import Rollout

STEPS, STORED_STATE = "steps", "stored_state"
"""Entries of a row of sequences: those of each step, and the memory state before the first."""
StorageOption = LazyTensorStorage | Callable[[int], LazyTensorStorage] | None
"""A storage, or a function that makes one with a number of rows."""


class OneRolloutBuffer(ReplayBuffer):
    """Base of the rollout buffers: holds one rollout, and iterating over it is one epoch.

    Args:
        num_steps: steps of one rollout, over all environments.
        rows: rows of the storage.
        batch_size: rows in a minibatch.
        state_keys: entries that are memory states, or tensordicts of them.
        storage: a storage, or a function that makes one with a number of rows; default `LazyTensorStorage`.
        **options: those of TorchRL's `ReplayBuffer`.

    Raises:
        ValueError: if the storage is too small.
    """

    def __init__(
        self,
        num_steps: int,
        rows: int,
        batch_size: int,
        *,
        state_keys: Sequence[NestedKey] = (keys.MEMORY_STATE,),
        storage: StorageOption = None,
        **options: Any,
    ) -> None:
        if storage is None:
            storage = LazyTensorStorage
        # Only here the number of rows is known.
        if callable(storage):
            storage = storage(rows)
        if storage.max_size < rows:
            raise ValueError(f"the storage holds {storage.max_size} rows; a rollout has {rows}.")
        # Without replacement, so that an epoch covers every row exactly once.
        super().__init__(storage=storage, sampler=SamplerWithoutReplacement(), batch_size=batch_size, **options)
        self.num_steps = num_steps
        self.state_keys = [unravel_key(key) for key in state_keys]

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Yield the minibatches of one epoch, from its start even after an epoch that was not finished."""
        self._end_epoch()
        return super().__iter__()

    def state_steps(self, steps: int) -> list[int]:
        """Return the steps of a rollout of length T before which a memory state is needed: here the first."""
        del steps
        return [0]

    def _replace_rows(self, rows: TensorDictBase) -> None:
        """Store these rows and drop those of the rollout before."""
        # The order matters: a prefetched batch must not read rows that are about to change.
        self._end_epoch()
        self.empty()
        self.extend(rows)

    def _end_epoch(self) -> None:
        """Drop the rest of an epoch that was not finished, prefetched batches included."""
        if self._prefetch:
            # First the prefetched batches: a thread that still prefetches moves the sampler.
            with self._futures_lock:
                self._clear_prefetch_queue_locked()
        self.sampler._empty()

    def _checked_steps(self, rollout: TensorDictBase | Rollout) -> TensorDictBase:
        """Check the shape of a rollout, and return its steps.

        Raises:
            ValueError: if it is not [N, T], or has another number of steps than the buffer.
            KeyError: if it has no `is_init`.
        """
        steps = rollout.steps if isinstance(rollout, Rollout) else rollout
        if steps.ndim != 2:
            raise ValueError(
                f"a rollout has batch size [N, T]; got {list(steps.batch_size)}. Without a batch of environments, "
                "store rollout.unsqueeze(0). With several workers, make the collector with cat_results=0."
            )
        if steps.get(keys.IS_INIT, None) is None:
            raise KeyError(
                f"the rollout has no {keys.IS_INIT!r}, which marks the first steps of episodes: add "
                "torchrl.envs.InitTracker() to the environment."
            )
        if steps.numel() != self.num_steps:
            raise ValueError(
                f"the buffer was made for rollouts of {self.num_steps} steps; got {steps.shape[0]} x {steps.shape[1]}."
            )
        return steps


class SequenceBuffer(OneRolloutBuffer):
    """Base of the buffers whose rows are consecutive steps with one memory state.

    Args:
        *sizes: those of `OneRolloutBuffer`.
        zero_after_resets: see `RecurrentRolloutBuffer`.
        **options: those of `OneRolloutBuffer`.
    """

    def __init__(self, *sizes: int, zero_after_resets: bool = True, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.zero_after_resets = zero_after_resets

    def sample(self, batch_size: int | None = None, return_info: bool = False) -> Any:
        """Return sequences [B, S], and TorchRL's info if it is requested."""
        rows, info = super().sample(batch_size, return_info=True)
        row = torch.as_tensor(info["index"], device=rows.device).reshape(-1)
        sequences = self._sequences(rows, row)
        return (sequences, info) if return_info else sequences

    def state_bytes(self) -> int:
        """Return the size of the stored states in bytes."""
        return self._stored_rows().get(STORED_STATE).bytes()

    def _stored_rows(self) -> TensorDictBase:
        return self._storage.get(slice(0, len(self)))

    @abstractmethod
    def _sequences(self, rows: TensorDictBase, row: Tensor) -> TensorDictBase:
        """Return the sequences [B, S] of stored rows with the numbers `row`."""


class RolloutBuffer(OneRolloutBuffer):
    """Single steps in shuffled order, for agents without memory.

    Iterating over the buffer is one epoch: every step comes exactly once. Storing a rollout replaces the one before.

    Args:
        num_steps: steps of one rollout, over all environments.
        batch_size: steps in a minibatch.
        **options: `state_keys`, `storage` and those of TorchRL's `ReplayBuffer`. `state_keys` are the entries that are
            memory states, which are not stored. `storage` may be a function that makes one with a number of rows.
    """

    def __init__(self, num_steps: int, batch_size: int, **options: Any) -> None:
        super().__init__(num_steps, num_steps, batch_size, **options)

    def store(self, rollout: TensorDictBase | Rollout, policy: TensorDictModuleBase | None = None) -> None:
        """Store a rollout [N, T]; `policy` is not used.

        Raises:
            ValueError: if it is not [N, T], or has another number of steps than the buffer.
        """
        del policy
        steps = self._checked_steps(rollout)
        self._replace_rows(steps.exclude(keys.NEXT, *self.state_keys).reshape(-1))
