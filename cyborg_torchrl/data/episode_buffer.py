"""The buffer of whole episodes."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from cyborg_torchrl import keys
from cyborg_torchrl.data.chunks import Packing, ceil_div, pack_episodes
from cyborg_torchrl.data.rollout import Rollout
from cyborg_torchrl.data.rollout_buffer import STEPS, STORED_STATE, SequenceBuffer
from cyborg_torchrl.modules.replay import as_primed, with_states


class EpisodeBuffer(SequenceBuffer):
    """Whole episodes of different lengths, packed into rows, longest first.

    A row starts from the initial state, or from the stored state of an episode that continues from the rollout before.
    Every other episode in it begins with a reset, so nothing passes from one episode to the next. Places that no
    episode fills are padding; ("collector", "mask") is false there.

    Iterating over the buffer is one epoch: every step is trained exactly once. Storing a rollout replaces the one
    before.

    Args:
        num_steps: steps of one rollout, over all environments.
        row_length: steps of a row, at least those of the longest episode in a rollout.
        batch_size: rows in a minibatch.
        num_envs: N.
        **options: `state_keys`, `storage` and those of TorchRL's `ReplayBuffer`, and `zero_after_resets` (see
            `RecurrentRolloutBuffer`). `state_keys` are the entries that are memory states, or tensordicts of them.
            `storage` may be a function that makes one with a number of rows.

    Raises:
        ValueError: if the storage is too small for a rollout.
    """

    def __init__(self, num_steps: int, row_length: int, batch_size: int, *, num_envs: int, **options: Any) -> None:
        # Any two rows together hold more steps than one row, except for rows that continued episodes begin.
        rows = num_envs + 2 * ceil_div(num_steps, row_length)
        super().__init__(num_steps, rows, batch_size, **options)
        self.row_length, self.num_envs = row_length, num_envs

    def store(self, rollout: TensorDictBase | Rollout, policy: TensorDictModuleBase | None = None) -> None:
        """Store a rollout [N, T]; `policy` is not used.

        Raises:
            ValueError: if it is not [N, T], has another number of steps than the buffer, or an episode does not fit
                into a row.
        """
        del policy
        self._checked_steps(rollout)
        if not isinstance(rollout, Rollout):
            rollout = Rollout.from_steps(rollout, self.state_keys, [0])
        steps = rollout.steps
        packing = pack_episodes(steps.get(keys.IS_INIT).squeeze(-1), self.row_length)
        rows = self._packed_steps(steps, packing)
        # The first step of a row decides its state: the environment in which that step was taken.
        environment = packing.position[:, 0] // steps.shape[1]
        # A row that begins with a reset starts from the initial state, not from the environment's stored one.
        states = as_primed(rollout.stored_states[:, 0][environment], rows.get(keys.IS_INIT)[:, 0])
        self._replace_rows(TensorDict({STEPS: rows, STORED_STATE: states}, rows.batch_size[:1]))

    def _packed_steps(self, steps: TensorDictBase, packing: Packing) -> TensorDictBase:
        position = packing.position
        is_in_order = bool((position.flatten().diff() == 1).all())
        if position.shape == steps.shape and is_in_order:
            rows = steps.exclude(keys.NEXT)  # one episode a row, as collected: nothing has to be copied
        else:
            rows = steps.exclude(keys.NEXT)[position // steps.shape[1], position % steps.shape[1]]
        if not bool(packing.is_step.all()):
            rows.set(keys.TRAIN_MASK, packing.is_step.unsqueeze(-1))
        return rows

    def _sequences(self, rows: TensorDictBase, row: Tensor) -> TensorDictBase:
        del row
        return with_states(rows.get(STEPS), rows.get(STORED_STATE), zero_after_resets=self.zero_after_resets)
