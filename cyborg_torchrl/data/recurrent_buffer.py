"""The rollout buffer of agents with memory: chunks, each with the memory state before it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from cyborg_torchrl import keys
from cyborg_torchrl.data.chunks import Windows, ceil_div, window_starts, windows
from cyborg_torchrl.data.rollout import Rollout
from cyborg_torchrl.data.rollout_buffer import STEPS, STORED_STATE, SequenceBuffer
from cyborg_torchrl.modules.replay import as_primed, state_after, with_states


class RecurrentRolloutBuffer(SequenceBuffer):
    """Chunks of consecutive steps, each with the memory state before its first step.

    A stored row is a stretch of `state_stride` steps of one environment and one memory state, as TensorDict entries. By
    default a stretch is one chunk of `seq_len` steps. A sample is a batch of sequences [B, burn_in + seq_len].

    In a sequence, the state has its usual key at every step. It is an expanded view of the first step's state and takes
    no memory. It is zero from an episode's first step on, so policies that read the stored state at resets (TorchRL's
    GRUModule and LSTMModule) are right as well.

    With `burn_in`, each sequence begins with up to that many steps before its chunk. They are marked by
    ("collector", "burn_in"). An episode that begins among them restarts the memory there, as in acting. If some steps
    are not trained (burn-in, or the padding of a shorter last chunk), ("collector", "mask") is true for the trained
    ones. TorchRL's losses read this mask.

    Iterating over the buffer is one epoch: every step is trained exactly once. Storing a rollout replaces the one
    before.

    Args:
        num_steps: steps of one rollout, over all environments.
        seq_len: L, steps in a chunk.
        batch_size: chunks in a minibatch.
        num_envs: N; needed if `seq_len` (or the stride) does not divide the rollout's length T.
        burn_in: K, steps before each chunk that are replayed without gradient.
        state_stride: steps for each stored state, a multiple of `seq_len`; None: `seq_len`. The states of the chunks
            between are recomputed exactly, from the stored one and with the parameters that acted. A minibatch then
            takes all chunks of a stretch.
        state_dtype: precision of the stored states; None: that of the rollout.
        start_state: "stored", or "initial": every sequence starts from the initial state, even in the middle of an
            episode. Many libraries do the latter; it is wrong and exists here for comparison.
        **options: `zero_after_resets`, `state_keys`, `storage` and those of TorchRL's `ReplayBuffer`. With
            `zero_after_resets=False`, states are views of the first step's everywhere. This saves memory and time, and
            is right for a `PPOAgent`, which reads no other. `state_keys` are the entries that are memory states, or
            tensordicts of them. `storage` has one row a stretch, on a memmap or a device, for example. It may be a
            function that makes one with a number of rows.

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
        **options: Any,
    ) -> None:
        stride = seq_len if state_stride is None else state_stride
        _check_sizes(num_steps, seq_len, batch_size, num_envs, burn_in, stride)
        if start_state not in ("stored", "initial"):
            raise ValueError(f"start_state must be 'stored' or 'initial'; got '{start_state}'.")
        steps_per_env = num_steps // (num_envs or 1)
        chunks = ceil_div(steps_per_env, seq_len)
        stride = min(stride, chunks * seq_len)  # at most the rollout
        stretches = ceil_div(steps_per_env, stride)
        rows = stretches * (num_envs or 1)
        rows_per_batch = ceil_div(batch_size * stretches, chunks)
        super().__init__(num_steps, rows, rows_per_batch, **options)
        self.seq_len, self.num_envs, self.burn_in = seq_len, num_envs, burn_in
        self.state_stride, self.state_dtype, self.start_state = stride, state_dtype, start_state
        self.steps_per_env = steps_per_env
        self._dtypes: dict[NestedKey, torch.dtype] = {}
        self._behaviour: TensorDictModuleBase | None = None

    def state_steps(self, steps: int) -> list[int]:
        """Return the steps of a rollout of length T before which a memory state is needed, in ascending order."""
        return sorted(set(window_starts(steps, self.burn_in, self.state_stride)))

    def store(self, rollout: TensorDictBase | Rollout, policy: TensorDictModuleBase | None = None) -> None:
        """Store a rollout [N, T].

        Args:
            rollout: a tensordict with a state at every step, or a `Rollout` with the states of `state_steps`.
            policy: the policy that acted, not changed since. It is copied, and needed only if `state_stride` is larger
                than `seq_len`.

        Raises:
            ValueError: if it is not [N, T], has another number of steps than the buffer, or has other states than
                those of `state_steps`.
        """
        steps = self._checked_steps(rollout)
        self._check_lengths(*steps.shape)
        state_steps = self.state_steps(steps.shape[1])
        if not isinstance(rollout, Rollout):
            rollout = Rollout.from_steps(rollout, self.state_keys, state_steps)
        has_states = not rollout.stored_states.is_empty()
        if has_states and list(rollout.state_steps) != state_steps:
            raise ValueError(
                f"the rollout has states before the steps {list(rollout.state_steps)}; needed: {state_steps}. Make the "
                "collector with state_steps=buffer.state_steps."
            )
        if has_states and self.state_stride > self.seq_len:
            if policy is None:
                raise ValueError(
                    "with a state_stride above seq_len, store(rollout, policy) needs the policy that acted."
                )
            # A copy: the optimiser changes the policy between epochs, but states must be those of acting.
            self._behaviour = copy.deepcopy(policy).requires_grad_(False)
        self.steps_per_env = steps.shape[1]
        self._replace_rows(self._to_rows(rollout))

    def chunks(self, chunk: Tensor, num_envs: int) -> TensorDictBase:
        """Return the sequences of some chunks of the first environments.

        Args:
            chunk: C numbers of chunks within an environment, ascending.
            num_envs: how many environments.

        Returns:
            Sequences [C num_envs, burn_in + seq_len], chunk after chunk.
        """
        # Chunks are numbered over all environments: those of environment 0 first, then those of environment 1, ...
        numbers = (chunk.unsqueeze(1) + self._chunks_per_env * torch.arange(num_envs)).flatten()
        row = (numbers * self.seq_len // self.state_stride).unique()
        sequences, found = self._numbered_sequences(self._storage.get(row), row)
        return sequences[(found == numbers.unsqueeze(1)).to(torch.uint8).argmax(1)]

    def replace_states(self, rollout: Rollout) -> None:
        """Replace the stored states by those of a rollout, such as states recomputed with new parameters."""
        self._stored_rows().get(STORED_STATE).update_(self._states_of_rows(rollout))

    @property
    def _chunks_per_env(self) -> int:
        """Chunks of one environment in the storage, padding included."""
        return ceil_div(self.steps_per_env, self.state_stride) * (self.state_stride // self.seq_len)

    def _check_lengths(self, num_envs: int, length: int) -> None:
        if self.num_envs not in (None, num_envs):
            raise ValueError(f"the buffer was made for {self.num_envs} environments; got {num_envs} x {length} steps.")
        if self.num_envs is None and length % self.state_stride:
            name = "seq_len" if self.state_stride == self.seq_len else "state_stride"
            raise ValueError(
                f"{name} = {self.state_stride} does not divide the rollout's length {length}. Make the buffer with "
                f"num_envs={num_envs} to allow a shorter last chunk."
            )

    def _to_rows(self, rollout: Rollout) -> TensorDict:
        steps = rollout.steps.exclude(keys.NEXT)
        padding = -steps.shape[1] % self.state_stride
        if padding:
            # Rows have one length. The last step is repeated; the mask of trained steps excludes the copies.
            steps = torch.cat([steps, steps[:, -1:].expand(steps.shape[0], padding)], 1)
        states = self._states_of_rows(rollout)
        self._dtypes = {key: states.get(key).dtype for key in states.keys(True, True)}
        if self.state_dtype is not None:
            states = states.to(self.state_dtype)
        rows = steps.reshape(-1, self.state_stride)
        return TensorDict({STEPS: rows, STORED_STATE: states}, rows.batch_size[:1])

    def _states_of_rows(self, rollout: Rollout) -> TensorDictBase:
        """Return one state a stored row, [rows]. Rows may share a state where the burn-in reaches the first step."""
        starts = window_starts(rollout.steps.shape[1], self.burn_in, self.state_stride)
        states = rollout.stored_states
        if starts != list(rollout.state_steps):
            states = states[:, [rollout.state_steps.index(start) for start in starts]]
        return states.contiguous().reshape(-1)

    def _sequences(self, rows: TensorDictBase, row: Tensor) -> TensorDictBase:
        return self._numbered_sequences(rows, row)[0]

    def _numbered_sequences(self, rows: TensorDictBase, row: Tensor) -> tuple[TensorDictBase, Tensor]:
        """Return the sequences of stored rows, and the number of each chunk, counted over all environments."""
        if self._rows_are_sequences():
            sequences, states, chunk = rows.get(STEPS), self._states_in_full_precision(rows), row
        else:
            sequences, states, chunk = self._cut_sequences(rows, row)
        if self.start_state == "initial":  # as if an episode began at the first step of every sequence
            is_init = sequences.get(keys.IS_INIT).clone()
            is_init[:, 0] = True
            sequences, states = sequences.set(keys.IS_INIT, is_init), torch.zeros_like(states)
        return with_states(sequences, states, zero_after_resets=self.zero_after_resets), chunk

    def _rows_are_sequences(self) -> bool:
        """Return whether stored rows need no cutting: one chunk a row, no burn-in, no padding."""
        return not self.burn_in and self.state_stride == self.seq_len and self.steps_per_env % self.seq_len == 0

    def _states_in_full_precision(self, rows: TensorDictBase) -> TensorDictBase:
        stored = rows.get(STORED_STATE)
        if self.state_dtype is None:
            return stored
        states = {key: stored.get(key).to(dtype) for key, dtype in self._dtypes.items()}
        return TensorDict(states, stored.batch_size, device=stored.device)

    def _cut_sequences(self, rows: TensorDictBase, row: Tensor) -> tuple[TensorDictBase, TensorDictBase, Tensor]:
        """Return sequences that overlap (burn-in), end early (padding), or start between stored states.

        Also return the state before each sequence, and the number of its chunk.
        """
        steps = self._stored_rows().get(STEPS).reshape(-1)
        is_init = steps.get(keys.IS_INIT)
        states = self._states_in_full_precision(rows)
        chunks_per_row = self.state_stride // self.seq_len
        sequences: list[TensorDictBase] = []
        first_states: list[TensorDictBase] = []
        chunks: list[Tensor] = []
        window: Windows | None = None
        # From the first chunk of each stretch, whose state is stored, to the last: each state leads to the next.
        for j in range(chunks_per_row):
            before, chunk = window, row * chunks_per_row + j
            # Padding at the end of an environment has no chunk j.
            exists = (chunk % self._chunks_per_env) * self.seq_len < self.steps_per_env
            row, chunk, states = row[exists], chunk[exists], states[exists]
            if not len(row):
                break
            window = windows(chunk, self._chunks_per_env, self.seq_len, self.burn_in, self.steps_per_env)
            if before is not None:
                states = self._advance(steps, before.position[exists, 0], window.position[:, 0], states)
                states = as_primed(states, is_init[window.position[:, 0]])
            sequence = steps[window.position]
            sequence.set(keys.BURN_IN, window.is_burn_in.unsqueeze(-1))
            sequence.set(keys.TRAIN_MASK, window.is_trained.unsqueeze(-1))
            sequences.append(sequence)
            first_states.append(states)
            chunks.append(chunk)
        return torch.cat(sequences), torch.cat(first_states), torch.cat(chunks)

    def _advance(self, steps: TensorDictBase, begin: Tensor, end: Tensor, states: TensorDictBase) -> TensorDictBase:
        """Return the states before the steps `end`, from those before the steps `begin`, with the policy that acted."""
        if self._behaviour is None or states.is_empty():
            return states
        states = states.clone()
        # Rows of equal length are replayed together; there are few different lengths.
        for length in (end - begin).unique().tolist():
            if length:
                rows = (end - begin) == length
                positions = begin[rows].unsqueeze(1) + torch.arange(length, device=begin.device)
                states[rows] = state_after(self._behaviour, steps[positions], states[rows], self.state_keys)
        return states


def _check_sizes(
    num_steps: int, seq_len: int, batch_size: int, num_envs: int | None, burn_in: int, stride: int
) -> None:
    if seq_len < 1 or (num_envs is None and num_steps % seq_len):
        raise ValueError(f"seq_len must be >= 1 and divide num_steps = {num_steps}; got {seq_len}.")
    if num_envs is not None and (num_envs < 1 or num_steps % num_envs):
        raise ValueError(f"num_envs must be >= 1 and divide num_steps = {num_steps}; got {num_envs}.")
    if burn_in < 0:
        raise ValueError(f"burn_in must be >= 0; got {burn_in}.")
    if stride < 1 or stride % seq_len:
        raise ValueError(f"state_stride must be a multiple of seq_len = {seq_len}; got {stride}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1; got {batch_size}.")
