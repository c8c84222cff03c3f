"""A rollout that holds memory states at some steps only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from cyborg_torchrl import keys


@dataclass
class Rollout:
    """Steps of N environments, and the memory states before some of these steps."""

    steps: TensorDictBase
    """Entries of the steps, [N, T], as a collector yields them, without memory states."""
    stored_states: TensorDictBase
    """Memory states before the steps `state_steps`, [N, C], under their own keys; empty without memory."""
    state_steps: tuple[int, ...]
    """Indices of C steps, in ascending order; the first is 0."""

    @staticmethod
    def from_steps(steps: TensorDictBase, state_keys: Sequence[NestedKey], state_steps: Sequence[int]) -> Rollout:
        """Return the rollout [N, T] of a collector that stores a state at every step.

        Args:
            steps: entries of the steps, memory states included, [N, T].
            state_keys: the entries that are memory states.
            state_steps: the steps whose states are kept; all other states are dropped.

        Raises:
            ValueError: if the rollout is not [N, T], or has some of the state keys but not all.
        """
        if steps.ndim != 2:
            raise ValueError(f"a rollout has batch size [N, T]; got {list(steps.batch_size)}.")
        # A policy without memory has no state keys in its rollout; some without others is a mistake of the collector.
        missing = [key for key in state_keys if steps.get(key, None) is None]
        if missing and len(missing) < len(state_keys):
            raise ValueError(f"the rollout has no memory state {missing}, but has the others of state_keys.")
        stored_states = steps.select(*state_keys, strict=False)[:, list(state_steps)]
        next_states = [(keys.NEXT, *((key,) if isinstance(key, str) else key)) for key in state_keys]
        # Without its entries, the tensordict of the states would stay behind, empty.
        without_states = steps.exclude(*state_keys, *next_states).filter_empty_()
        return Rollout(without_states, stored_states, tuple(state_steps))
