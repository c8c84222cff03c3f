"""`permuted_copy`: see a sequence of symbols, wait, and name them in another order."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cyborg_torchrl.envs.memory.copy_memory import SequenceTask
from cyborg_torchrl.envs.memory.task import Latents, at, four_levels
from cyborg_torchrl.registry import register_environment


@register_environment("permuted_copy")
class PermutedCopyEnv(SequenceTask):
    """Copying in a permuted order, as a batch of episodes on one device.

    An episode lasts `2 sequence + horizon` steps: the symbols one by one, `horizon` blank steps, and as many questions
    as there were symbols, in random order. The next question cannot be predicted, so all symbols must be remembered.

    - Observation, [N, sequence + symbols + 1] float: at symbols and at questions the position in the sequence as
      one-hot; at symbols the symbol as one-hot; the question flag (last entry). A blank step is all zero.
    - Action, [N] integer in [0, symbols): the answer is the symbol at the position of the question; other actions are
      ignored.
    - Reward: +1 for a right answer, -1 for a wrong one, 0 otherwise. The last answer terminates the episode.
    - "success", [N, 1] float: share of right answers.

    Chance is 1 / symbols.

    Args:
        num_envs: N, number of environments.
        sequence: number of symbols in an episode, 1 or more; None: the level's.
        symbols: number of different symbols, 2 or more.
        horizon: blank steps between the last symbol and the first question, 0 or more; None: the level's.
        level: easy (the default), medium, hard or extreme.
        device: device of all tensors.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or not an integer, or the level is unknown.
    """

    levels = four_levels((50, 8, 0.85), (200, 15, 0.75), (500, 25, 0.65), (2000, 40, 0.50))
    default = levels["easy"]

    def __init__(self, num_envs: int = 64, *, sequence: int | None = None, symbols: int = 8, **shared: Any) -> None:
        super().__init__(num_envs, {"sequence": sequence, "symbols": symbols}, **shared)

    def _draw(self) -> Latents:
        return {**super()._draw(), "order": self.permutations(self.sequence)}

    def _asked(self, time: Tensor, latents: Latents) -> Tensor:
        return at(latents["order"], time - self.first_question)
