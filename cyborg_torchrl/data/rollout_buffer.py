# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (tensordict's and torchrl's annotations are narrower than what they take)
"""Rollout buffers: TorchRL ReplayBuffers that keep what an update needs, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement

from cyborg_torchrl import keys

STEPS, KEYFRAME = "steps", "keyframe"
"""Entries of a stored row: those of each step, and the state before the first."""


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
            storage=_storage(storage, num_steps),
            sampler=SamplerWithoutReplacement(),
            batch_size=batch_size,
            **options,
        )
        self.num_steps = num_steps
        self.state_keys = [unravel_key(key) for key in state_keys]

    def __iter__(self) -> Iterator[TensorDictBase]:
        """One epoch, from its beginning even if the one before was broken off."""
        _forget_epoch(self)
        return super().__iter__()

    def store(self, rollout: TensorDictBase) -> None:
        """Stores a rollout [N, T], in place of the one before.

        Raises:
            ValueError: if it is not [N, T], or has another number of steps than the buffer was made for.
        """
        _check_rollout(rollout, self.num_steps)
        _forget_epoch(self)
        self.empty()
        self.extend(rollout.exclude(keys.NEXT, *self.state_keys).reshape(-1))


class RecurrentRolloutBuffer(ReplayBuffer):
    """Chunks of consecutive steps, each with the one memory state that it began with.

    A stored row is a chunk: the entries of `seq_len` steps, [seq_len, ...], and the state before the first of them
    (the keyframe) as TensorDict entries. A sample is a batch of sequences [B, seq_len]. In it the state stands
    under its own key at every step, as a view of the keyframe that takes no memory, and zero from an episode's
    first step on, so that policies which read the stored state at resets (TorchRL's GRUModule and LSTMModule) are
    right as well.

    Args:
        num_steps: steps of one rollout, all environments together.
        seq_len: L, steps in a chunk; it must divide the rollout's length T.
        batch_size: chunks in a minibatch.
        state_keys: entries that are memory states (or tensordicts of them).
        storage: default `LazyTensorStorage(num_steps // seq_len)`.

    Iterating over the buffer is one epoch: every step exactly once. Storing a rollout replaces the one before.

    Raises:
        ValueError: if seq_len does not divide num_steps, or the storage is too small for a rollout.
    """

    def __init__(
        self,
        num_steps: int,
        seq_len: int,
        batch_size: int,
        *,
        state_keys: Sequence[NestedKey] = (keys.MEMORY_STATE,),
        storage: LazyTensorStorage | None = None,
        **options: Any,
    ) -> None:
        if seq_len < 1 or num_steps % seq_len:
            raise ValueError(f"seq_len must be >= 1 and divide num_steps = {num_steps}; got {seq_len}.")
        super().__init__(
            storage=_storage(storage, num_steps // seq_len),
            sampler=SamplerWithoutReplacement(),
            batch_size=batch_size,
            **options,
        )
        self.num_steps, self.seq_len = num_steps, seq_len
        self.state_keys = [unravel_key(key) for key in state_keys]

    def __iter__(self) -> Iterator[TensorDictBase]:
        """One epoch, from its beginning even if the one before was broken off."""
        _forget_epoch(self)
        return super().__iter__()

    def store(self, rollout: TensorDictBase) -> None:
        """Stores a rollout [N, T], in place of the one before.

        Raises:
            ValueError: if it is not [N, T], has another number of steps than the buffer was made for, or seq_len
                does not divide T.
        """
        _check_rollout(rollout, self.num_steps)
        if rollout.shape[1] % self.seq_len:
            raise ValueError(f"seq_len = {self.seq_len} does not divide the rollout's length {rollout.shape[1]}.")
        _forget_epoch(self)
        self.empty()
        self.extend(self._to_rows(rollout))

    def sample(self, batch_size: int | None = None, return_info: bool = False) -> Any:
        """Returns sequences [B, seq_len] (and TorchRL's info, on request)."""
        rows, info = super().sample(batch_size, return_info=True)
        sequences = self._to_sequences(rows)
        return (sequences, info) if return_info else sequences

    def state_bytes(self) -> int:
        """Bytes that the stored states take."""
        return self[:].get(KEYFRAME).bytes()

    def _to_rows(self, rollout: TensorDictBase) -> TensorDict:
        chunks = rollout.exclude(keys.NEXT).reshape(-1, self.seq_len)
        keyframes = chunks.select(*self.state_keys, strict=False)[:, 0]
        return TensorDict({STEPS: chunks.exclude(*self.state_keys), KEYFRAME: keyframes}, chunks.batch_size[:1])

    def _to_sequences(self, rows: TensorDictBase) -> TensorDictBase:
        sequences, keyframes = rows.get(STEPS), rows.get(KEYFRAME)
        is_init = sequences.get(keys.IS_INIT).squeeze(-1)
        is_later_episode = is_init[:, 1:].cumsum(1) > 0
        has_resets = bool(is_later_episode.any())

        def spread(state: Tensor) -> Tensor:
            steps = state.unsqueeze(1).expand(-1, self.seq_len, *state.shape[1:])
            if not has_resets:
                return steps
            mask = is_later_episode.view(*is_later_episode.shape, *[1] * (state.ndim - 1))
            return torch.cat([steps[:, :1], steps[:, 1:].masked_fill(mask, 0.0)], 1)

        for key in keyframes.keys(include_nested=True, leaves_only=True):
            sequences.set(key, spread(keyframes.get(key)))
        return sequences


def _storage(storage: LazyTensorStorage | None, rows: int) -> LazyTensorStorage:
    if storage is not None and storage.max_size < rows:
        raise ValueError(f"the storage holds {storage.max_size} rows; a rollout has {rows}.")
    return LazyTensorStorage(rows) if storage is None else storage


def _forget_epoch(buffer: ReplayBuffer) -> None:
    """Drops what is left of an epoch that was broken off, prefetched batches included."""
    if buffer._prefetch:
        with buffer._futures_lock:  # first, since what is being prefetched moves the sampler
            buffer._clear_prefetch_queue_locked()
    buffer.sampler._empty()


def _check_rollout(rollout: TensorDictBase, num_steps: int) -> None:
    if rollout.ndim != 2:
        raise ValueError(f"a rollout has batch size [N, T]; got {list(rollout.batch_size)}.")
    if rollout.get(keys.IS_INIT, None) is None:
        raise KeyError(
            f"the rollout has no {keys.IS_INIT!r}, which says where episodes begin: add torchrl.envs.InitTracker() to "
            "the environment."
        )
    if rollout.numel() != num_steps:
        raise ValueError(
            f"the buffer was made for rollouts of {num_steps} steps; got {rollout.shape[0]} x {rollout.shape[1]}."
        )
