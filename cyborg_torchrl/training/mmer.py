"""MMER, the metric of the POPGym paper: the largest of the epochs' mean returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

EPOCH_STEPS = 65_536
"""Steps of an epoch in the paper, which trains 228 of them."""


@dataclass
class EpochReturns:
    """Mean return of the training episodes that ended in an epoch of 65,536 steps, and the largest of all epochs.

    An epoch ends with the update that reaches its last step, and has all episodes of that update. An unfinished epoch
    does not count.

    Source: Morad et al. (2023), POPGym, the maximum mean episodic reward (MMER).
    """

    epoch: int = 0
    """Finished epochs."""
    episodes: float = 0.0
    """Episodes that ended in the present epoch."""
    total: float = 0.0
    """Sum of their returns."""
    mmer: float | None = None
    """Largest mean return of a finished epoch; None: no episode has ended in any."""

    def add(self, num_steps: int, episodes: float, mean_return: float | None) -> None:
        """Add the episodes of an update.

        Args:
            num_steps: steps of the run up to the end of the update.
            episodes: episodes that ended in the update.
            mean_return: their mean return; None: none ended.
        """
        if mean_return is not None:
            self.episodes += episodes
            self.total += episodes * mean_return
        epoch = num_steps // EPOCH_STEPS
        if epoch == self.epoch:
            return
        if self.episodes:
            mean = self.total / self.episodes
            self.mmer = mean if self.mmer is None else max(self.mmer, mean)
        self.epoch, self.episodes, self.total = epoch, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the values as a dictionary, from which the constructor builds a copy."""
        return asdict(self)
