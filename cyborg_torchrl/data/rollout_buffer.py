"""The rollout buffer of agents without memory, and what all rollout buffers share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement

from cyborg_torchrl import keys
from cyborg_torchrl.data.rollout import Rollout


class RolloutBuffer(ReplayBuffer):
    """Single steps in shuffled order, without memory states: for agents without memory.

    Args:
        num_steps: steps of one rollout, all environments together.
        batch_size: steps in a minibatch.
        state_keys: entries that are memory states, and not stored.
        storage: default `LazyTensorStorage(num_steps)`.

    Iterating over the buffer is one epoch: every step exactly once. Storing a rollout replaces the one before.
    """

    def __init__(
        self,
        num_steps: int,
        batch_size: int,
        *,
        state_keys: Sequence[NestedKey] = (keys.MEMORY_STATE,),
        storage: LazyTensorStorage | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            storage=make_storage(storage, num_steps),
            sampler=SamplerWithoutReplacement(),
            batch_size=batch_size,
            **options,
        )
        self.num_steps = num_steps
        self.state_keys = [unravel_key(key) for key in state_keys]

    def __iter__(self) -> Iterator[TensorDictBase]:
        """One epoch, from its beginning even if the one before was broken off."""
        forget_epoch(self)
        return super().__iter__()

    def state_steps(self, steps: int) -> list[int]:
        """Steps of a rollout before which a memory state is kept; the first, as in every rollout. None is stored."""
        del steps
        return [0]

    def store(self, rollout: TensorDictBase | Rollout, policy: TensorDictModuleBase | None = None) -> None:
        """Stores a rollout [N, T], in place of the one before; `policy` is not needed.

        Raises:
            ValueError: if it is not [N, T], or has another number of steps than the buffer was made for.
        """
        del policy
        rollout = rollout.steps if isinstance(rollout, Rollout) else rollout
        check_rollout(rollout, self.num_steps)
        forget_epoch(self)
        self.empty()
        self.extend(rollout.exclude(keys.NEXT, *self.state_keys).reshape(-1))


def make_storage(storage: LazyTensorStorage | None, rows: int) -> LazyTensorStorage:
    """The storage that was given, or a new one for `rows` rows.

    Raises:
        ValueError: if it is too small.
    """
    if storage is not None and storage.max_size < rows:
        raise ValueError(f"the storage holds {storage.max_size} rows; a rollout has {rows}.")
    return LazyTensorStorage(rows) if storage is None else storage


def forget_epoch(buffer: ReplayBuffer) -> None:
    """Drops what is left of an epoch that was broken off, prefetched batches included."""
    if buffer._prefetch:
        with buffer._futures_lock:  # first, since what is being prefetched moves the sampler
            buffer._clear_prefetch_queue_locked()
    buffer.sampler._empty()


def check_rollout(rollout: TensorDictBase, num_steps: int) -> None:
    """Refuses what is no rollout of that size.

    Raises:
        ValueError: if it is not [N, T], or has another number of steps.
        KeyError: if it does not say where episodes begin.
    """
    if rollout.ndim != 2:
        raise ValueError(
            f"a rollout has batch size [N, T]; got {list(rollout.batch_size)}. Without a batch of environments: "
            "rollout.unsqueeze(0). Of several workers: make the collector with cat_results=0."
        )
    if rollout.get(keys.IS_INIT, None) is None:
        raise KeyError(
            f"the rollout has no {keys.IS_INIT!r}, which says where episodes begin: add torchrl.envs.InitTracker() to "
            "the environment."
        )
    if rollout.numel() != num_steps:
        raise ValueError(
            f"the buffer was made for rollouts of {num_steps} steps; got {rollout.shape[0]} x {rollout.shape[1]}."
        )
