"""A rollout whose memory states are kept at some steps only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from cyborg_torchrl import keys


@dataclass
class Rollout:
    """Steps of N environments, and their memory states before some of them."""

    steps: TensorDictBase
    """[N, T]: what a collector yields, without memory states."""
    stored_states: TensorDictBase
    """[N, C]: the states before the steps `at`, under their own keys; empty for a policy without memory."""
    state_steps: tuple[int, ...]
    """Ascending; C of them, the first of which is 0."""

    @staticmethod
    def from_steps(steps: TensorDictBase, state_keys: Sequence[NestedKey], at: Sequence[int]) -> Rollout:
        """From a rollout [N, T] that holds a state at every step: those `at` are kept.

        Raises:
            ValueError: if the rollout is not [N, T], or has one of several state keys but not the others.
        """
        if steps.ndim != 2:
            raise ValueError(f"a rollout has batch size [N, T]; got {list(steps.batch_size)}.")
        there = [steps.get(key, None) is not None for key in state_keys]
        if any(there) and not all(there):
            missing = [key for key, is_there in zip(state_keys, there, strict=True) if not is_there]
            raise ValueError(f"the rollout has no memory state {missing}, but others of state_keys.")
        stored_states = steps.select(*state_keys, strict=False)[:, list(at)]
        following = [(keys.NEXT, *((key,) if isinstance(key, str) else key)) for key in state_keys]
        return Rollout(steps.exclude(*state_keys, *following).filter_empty_(), stored_states, tuple(at))
