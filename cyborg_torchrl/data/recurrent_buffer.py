"""Rollout buffers of agents with memory: sequences, each with the one state that it begins with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement

from cyborg_torchrl import keys
from cyborg_torchrl.data.chunks import Windows, pack_episodes, window_starts, windows
from cyborg_torchrl.data.rollout import Rollout
from cyborg_torchrl.data.rollout_buffer import check_rollout, forget_epoch, make_storage
from cyborg_torchrl.modules.replay import as_primed, state_after, with_states

STEPS, STORED_STATE = "steps", "stored_state"
"""Entries of a stored row: those of each step, and the state before the first that is replayed or trained."""


class RecurrentRolloutBuffer(ReplayBuffer):
    """Chunks of consecutive steps, each with the memory state that it begins with.

    A stored row is a stretch of `state_stride` steps of one environment with one memory state, its stored_state, as
    TensorDict entries; by default a stretch is a chunk of `seq_len` steps. A sample is a batch of sequences
    [B, burn_in + seq_len]. In it the state stands under its own key at every step, as a view of the first that takes
    no memory, and zero from an episode's first step on, so that policies which read the stored state at resets
    (TorchRL's GRUModule and LSTMModule) are right as well.

    With `burn_in`, each sequence begins with up to that many steps before its chunk, marked by
    ("collector", "burn_in"): those that the rollout has. An episode that begins among them restarts memory there, as
    in acting. Where there are steps that are not trained (replayed ones, and what fills up a last chunk that is
    shorter), ("collector", "mask") is true for those that are; it is the mask that TorchRL's losses read.

    Args:
        num_steps: steps of one rollout, all environments together.
        seq_len: L, steps in a chunk.
        batch_size: chunks in a minibatch.
        num_envs: N; needed where seq_len (or the stride) does not divide the rollout's length T.
        burn_in: K, steps before each chunk that are replayed without gradient.
        state_stride: steps for each stored state, a multiple of seq_len; None: seq_len. States of chunks between
            are had again by replay from the stored one, with the parameters that the agent acted with, exactly; a
            minibatch then takes all chunks of a stretch.
        state_dtype: precision in which states are stored; None: that of the rollout.
        start_state: "stored", or "initial": every sequence begins as an episode does, whatever the agent remembered
            there. That is what most libraries do, and wrong; it is here to be compared with.
        state_keys: entries that are memory states (or tensordicts of them).
        storage: default `LazyTensorStorage`, one row a stretch; a memmap or a device are chosen with it.

    Iterating over the buffer is one epoch: every step trained exactly once. Storing a rollout replaces the one before.

    Raises:
        ValueError: if the numbers do not fit together, or the storage is too small for a rollout.
    """

    def __init__(
        self,
        num_steps: int,
        seq_len: int,
        batch_size: int,
        *,
        num_envs: int | None = None,
        burn_in: int = 0,
        state_stride: int | None = None,
        state_dtype: torch.dtype | None = None,
        start_state: str = "stored",
        state_keys: Sequence[NestedKey] = (keys.MEMORY_STATE,),
        storage: LazyTensorStorage | None = None,
        **options: Any,
    ) -> None:
        stride = seq_len if state_stride is None else state_stride
        _check_numbers(num_steps, seq_len, num_envs, burn_in, stride)
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1; got {batch_size}.")
        if start_state not in ("stored", "initial"):
            raise ValueError(f"start_state must be 'stored' or 'initial'; got '{start_state}'.")
        steps_per_env = num_steps // (num_envs or 1)
        chunks = -(-steps_per_env // seq_len)
        stride = min(stride, chunks * seq_len)  # no more than a rollout
        stretches = -(-steps_per_env // stride)
        super().__init__(
            storage=make_storage(storage, stretches * (num_envs or 1)),
            sampler=SamplerWithoutReplacement(),
            batch_size=max(1, -(-batch_size * stretches // chunks)),
            **options,
        )
        self.num_steps, self.seq_len, self.num_envs = num_steps, seq_len, num_envs
        self.burn_in, self.state_stride, self.state_dtype = burn_in, stride, state_dtype
        self.start_state = start_state
        self.state_keys = [unravel_key(key) for key in state_keys]
        self.steps_per_env = steps_per_env
        self._dtypes: dict[NestedKey, torch.dtype] = {}
        self._behaviour: TensorDictModuleBase | None = None

    def __iter__(self) -> Iterator[TensorDictBase]:
        """One epoch, from its beginning even if the one before was broken off."""
        forget_epoch(self)
        return super().__iter__()

    def state_steps(self, steps: int) -> list[int]:
        """Steps of a rollout of length T before which a memory state is needed, ascending."""
        return sorted(set(window_starts(steps, self.burn_in, self.state_stride)))

    def store(self, rollout: TensorDictBase | Rollout, policy: TensorDictModuleBase | None = None) -> None:
        """Stores a rollout [N, T], in place of the one before.

        Args:
            rollout: with a state at every step, or a `Rollout` with those of `state_steps`.
            policy: what acted, unchanged since; needed with a `state_stride` beyond `seq_len`, and copied then.

        Raises:
            ValueError: if it is not [N, T], has another number of steps than the buffer was made for, or its states
                are not those that are needed.
        """
        steps = rollout.steps if isinstance(rollout, Rollout) else rollout
        check_rollout(steps, self.num_steps)
        num_envs, length = steps.shape
        if self.num_envs not in (None, num_envs):
            raise ValueError(f"the buffer was made for {self.num_envs} environments; got {num_envs} x {length} steps.")
        if self.num_envs is None and length % self.state_stride:
            name = "seq_len" if self.state_stride == self.seq_len else "state_stride"
            raise ValueError(
                f"{name} = {self.state_stride} does not divide the rollout's length {length}; make the buffer with "
                f"num_envs={num_envs}, and the last chunks are shorter."
            )
        at = self.state_steps(length)
        if not isinstance(rollout, Rollout):
            rollout = Rollout.from_steps(rollout, self.state_keys, at)
        elif list(rollout.state_steps) != at and not rollout.stored_states.is_empty():
            raise ValueError(
                f"the rollout has states before the steps {list(rollout.state_steps)}; needed: {at}. Make the collector with "
                "state_steps=buffer.state_steps."
            )
        if self.state_stride > self.seq_len and not rollout.stored_states.is_empty():
            if policy is None:
                raise ValueError("with a state_stride beyond seq_len, store(rollout, policy) needs what acted.")
            self._behaviour = copy.deepcopy(policy).requires_grad_(False)
        self.steps_per_env = length
        forget_epoch(self)
        self.empty()
        self.extend(self._to_rows(rollout))

    def sample(self, batch_size: int | None = None, return_info: bool = False) -> Any:
        """Returns sequences [B, burn_in + seq_len] (and TorchRL's info, on request)."""
        rows, info = super().sample(batch_size, return_info=True)
        row = torch.as_tensor(info["index"], device=rows.device).reshape(-1)
        sequences, _ = self._sequences(rows, row)
        return (sequences, info) if return_info else sequences

    def chunks(self, chunk: Tensor, num_envs: int) -> TensorDictBase:
        """Returns the sequences of some chunks (numbers within an environment) of the first environments.

        Chunk after chunk, [len(chunk) num_envs, burn_in + seq_len].
        """
        per_env = -(-self.steps_per_env // self.state_stride) * (self.state_stride // self.seq_len)
        wanted = (chunk.unsqueeze(1) + per_env * torch.arange(num_envs)).flatten()
        row = (wanted * self.seq_len // self.state_stride).unique()
        sequences, number = self._sequences(self._storage.get(row), row)
        return sequences[(number == wanted.unsqueeze(1)).to(torch.uint8).argmax(1)]

    def state_bytes(self) -> int:
        """Bytes that the stored states take."""
        return self._storage.get(slice(0, len(self))).get(STORED_STATE).bytes()

    def replace_states(self, rollout: Rollout) -> None:
        """Puts the stored_states of a rollout in the place of the stored ones: those that today's parameters give."""
        target = self._storage.get(slice(0, len(self))).get(STORED_STATE)
        stored_states = self._stored_states(rollout)
        for key in target.keys(include_nested=True, leaves_only=True):
            target.get(key).copy_(stored_states.get(key))

    def _stored_states(self, rollout: Rollout) -> TensorDictBase:
        """One state a stored row."""
        starts = window_starts(rollout.steps.shape[1], self.burn_in, self.state_stride)
        stored_states = rollout.stored_states
        if starts != list(rollout.state_steps):
            stored_states = stored_states[:, [rollout.state_steps.index(start) for start in starts]]
        return stored_states.contiguous().reshape(-1)

    def _to_rows(self, rollout: Rollout) -> TensorDict:
        steps = rollout.steps.exclude(keys.NEXT)
        padding = -steps.shape[1] % self.state_stride
        if padding:
            steps = torch.cat([steps, steps[:, -1:].expand(steps.shape[0], padding)], 1)
        stored_states = self._stored_states(rollout)
        self._dtypes = {key: stored_states.get(key).dtype for key in stored_states.keys(True, True)}
        stored_states = stored_states if self.state_dtype is None else stored_states.to(self.state_dtype)
        rows = steps.reshape(-1, self.state_stride)
        return TensorDict({STEPS: rows, STORED_STATE: stored_states}, rows.batch_size[:1])

    def _states(self, rows: TensorDictBase) -> TensorDictBase:
        """The states of rows, in the precision that they came in."""
        stored = rows.get(STORED_STATE)
        if self.state_dtype is None:
            return stored
        states = {key: stored.get(key).to(dtype) for key, dtype in self._dtypes.items()}
        return TensorDict(states, stored.batch_size, device=stored.device)

    def _sequences(self, rows: TensorDictBase, row: Tensor) -> tuple[TensorDictBase, Tensor]:
        """The sequences of stored rows, and the number of each chunk, counted over all environments."""
        sequences, chunk = self._from_stored_states(rows, row)
        if self.start_state == "initial":
            is_init = sequences.get(keys.IS_INIT).clone()
            is_init[:, 0] = True
            sequences.set(keys.IS_INIT, is_init)
            for key in rows.get(STORED_STATE).keys(include_nested=True, leaves_only=True):
                sequences.set(key, torch.zeros_like(sequences.get(key)[:, :1]).expand_as(sequences.get(key)))
        return sequences, chunk

    def _from_stored_states(self, rows: TensorDictBase, row: Tensor) -> tuple[TensorDictBase, Tensor]:
        states, per_stretch = self._states(rows), self.state_stride // self.seq_len
        if not self.burn_in and per_stretch == 1 and not self.steps_per_env % self.seq_len:
            return with_states(rows.get(STEPS), states), row
        # sequences that overlap, are filled up, or lie between stored states
        flat = self._storage.get(slice(0, len(self))).get(STEPS).reshape(-1)
        per_env = -(-self.steps_per_env // self.state_stride) * per_stretch
        parts: list[tuple[TensorDictBase, TensorDictBase, Tensor]] = []
        at: Windows | None = None
        for j in range(per_stretch):
            begun, chunk = at, row * per_stretch + j
            exists = (chunk % per_env) * self.seq_len < self.steps_per_env
            row, chunk, states = row[exists], chunk[exists], states[exists]
            if not len(row):
                break
            at = windows(chunk, per_env, self.seq_len, self.burn_in, self.steps_per_env)
            if begun is not None:
                states = self._advance(flat, begun.position[exists, 0], at.position[:, 0], states)
                states = as_primed(states, flat.get(keys.IS_INIT)[at.position[:, 0]])
            parts.append((_masked(flat[at.position], at), states, chunk))
        sequences, stored, chunks = zip(*parts, strict=True)
        return with_states(torch.cat(sequences), torch.cat(stored)), torch.cat(chunks)

    def _advance(self, flat: TensorDictBase, begin: Tensor, end: Tensor, states: TensorDictBase) -> TensorDictBase:
        """The states before the steps `end`, from those before the steps `begin`, with what acted."""
        if self._behaviour is None or states.is_empty():
            return states
        states = states.clone()
        for length in (end - begin).unique().tolist():
            if length:
                mine = (end - begin) == length
                positions = begin[mine].unsqueeze(1) + torch.arange(length, device=begin.device)
                states[mine] = state_after(self._behaviour, flat[positions], states[mine], self.state_keys)
        return states


class EpisodeBuffer(ReplayBuffer):
    """Whole episodes of unequal length, laid end to end into rows, longest first.

    A row starts from the stored state of an episode that was carried over from the rollout before, or from the
    initial state; every other episode in it begins with a reset, so nothing passes from one to the next. The few
    places that no episode fits into are padding, outside ("collector", "mask").

    Args:
        num_steps: steps of one rollout, all environments together.
        row_length: steps of a row; at least the longest stretch of an episode in a rollout.
        batch_size: rows in a minibatch.
        num_envs: N.
        state_keys: entries that are memory states (or tensordicts of them).
        storage: default `LazyTensorStorage`, one row a row.

    Iterating over the buffer is one epoch: every step trained exactly once. Storing a rollout replaces the one before.

    Raises:
        ValueError: if the storage is too small for a rollout.
    """

    def __init__(
        self,
        num_steps: int,
        row_length: int,
        batch_size: int,
        *,
        num_envs: int,
        state_keys: Sequence[NestedKey] = (keys.MEMORY_STATE,),
        storage: LazyTensorStorage | None = None,
        **options: Any,
    ) -> None:
        # any two rows hold more than one row's worth of steps, but for those that carried episodes begin
        super().__init__(
            storage=make_storage(storage, num_envs + 2 * -(-num_steps // row_length)),
            sampler=SamplerWithoutReplacement(),
            batch_size=batch_size,
            **options,
        )
        self.num_steps, self.row_length, self.num_envs = num_steps, row_length, num_envs
        self.state_keys = [unravel_key(key) for key in state_keys]

    def __iter__(self) -> Iterator[TensorDictBase]:
        """One epoch, from its beginning even if the one before was broken off."""
        forget_epoch(self)
        return super().__iter__()

    def state_steps(self, steps: int) -> list[int]:
        """Steps of a rollout before which a memory state is stored: the first, for episodes that are carried over."""
        del steps
        return [0]

    def store(self, rollout: TensorDictBase | Rollout, policy: TensorDictModuleBase | None = None) -> None:
        """Stores a rollout [N, T], in place of the one before; `policy` is not needed.

        Raises:
            ValueError: if it is not [N, T], has another number of steps than the buffer was made for, or an episode
                does not fit into a row.
        """
        del policy
        steps = rollout.steps if isinstance(rollout, Rollout) else rollout
        check_rollout(steps, self.num_steps)
        if not isinstance(rollout, Rollout):
            rollout = Rollout.from_steps(rollout, self.state_keys, [0])
        packing = pack_episodes(steps.get(keys.IS_INIT).squeeze(-1), self.row_length)
        is_as_collected = packing.position.shape == steps.shape and bool((packing.position.flatten().diff() == 1).all())
        rows = rollout.steps.exclude(keys.NEXT) if is_as_collected else _at(rollout.steps, packing.position)
        if not bool(packing.is_step.all()):
            rows.set(keys.TRAIN_MASK, packing.is_step.unsqueeze(-1))
        stored_states = rollout.stored_states[:, 0][packing.position[:, 0] // steps.shape[1]]
        stored_states = as_primed(stored_states, rows.get(keys.IS_INIT)[:, 0])  # for rows that begin with a reset
        forget_epoch(self)
        self.empty()
        self.extend(TensorDict({STEPS: rows, STORED_STATE: stored_states}, rows.batch_size[:1]))

    def sample(self, batch_size: int | None = None, return_info: bool = False) -> Any:
        """Returns sequences [B, row_length] (and TorchRL's info, on request)."""
        rows, info = super().sample(batch_size, return_info=True)
        sequences = with_states(rows.get(STEPS), rows.get(STORED_STATE))
        return (sequences, info) if return_info else sequences

    def state_bytes(self) -> int:
        """Bytes that the stored states take."""
        return self._storage.get(slice(0, len(self))).get(STORED_STATE).bytes()


def _at(steps: TensorDictBase, position: Tensor) -> TensorDictBase:
    """Steps of a rollout, its environments laid end to end."""
    return steps.exclude(keys.NEXT)[position // steps.shape[1], position % steps.shape[1]]


def _check_numbers(num_steps: int, seq_len: int, num_envs: int | None, burn_in: int, stride: int) -> None:
    if seq_len < 1 or (num_envs is None and num_steps % seq_len):
        raise ValueError(f"seq_len must be >= 1 and divide num_steps = {num_steps}; got {seq_len}.")
    if num_envs is not None and (num_envs < 1 or num_steps % num_envs):
        raise ValueError(f"num_envs must be >= 1 and divide num_steps = {num_steps}; got {num_envs}.")
    if burn_in < 0:
        raise ValueError(f"burn_in must be >= 0; got {burn_in}.")
    if stride < 1 or stride % seq_len:
        raise ValueError(f"state_stride must be a multiple of seq_len = {seq_len}; got {stride}.")


def _masked(sequences: TensorDictBase, at: Windows) -> TensorDictBase:
    sequences.set(keys.BURN_IN, at.is_burn_in.unsqueeze(-1))
    sequences.set(keys.TRAIN_MASK, at.is_trained.unsqueeze(-1))
    return sequences
