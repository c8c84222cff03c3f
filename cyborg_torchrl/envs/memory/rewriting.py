"""The base of tasks in which new information replaces the old: several parts in a row, all of which must be right."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from cyborg_torchrl.envs.memory.task import Judgement, Latents, MemoryTask

STEP_COST = 0.01


class RewritingTask(MemoryTask):
    """A memory task of several parts in a row, each with one answer.

    A right answer pays 1, and a step without an answer costs 0.01. A wrong answer ends the episode and costs `mistake`.
    "success" is 1 if all answers were right, and 0 otherwise.

    A subclass implements `_act` instead of `_judge`.

    Source: Shchendrigin et al. (2026), "Memory retention is not enough to master memory tasks in reinforcement
    learning", arXiv 2601.15086.
    """

    mistake: ClassVar[float] = 1.0

    @abstractmethod
    def _act(self, action: Tensor, time: Tensor, latents: Latents) -> tuple[Tensor, Tensor]:
        """Return which of the actions [N] are answers, and which are right ones; replace entries of the latents."""

    def _judge(self, action: Tensor, time: Tensor, latents: Latents) -> Judgement:
        is_answer, is_right = self._act(action, time, latents)
        is_wrong = is_answer & ~is_right
        is_complete = self._num_right + is_right == self.num_answers
        is_over = is_wrong | is_complete | (time == self.max_episode_steps - 1)
        # The base class takes 1 for a wrong answer.
        bonus = is_wrong.float() * (1.0 - self.mistake) - (~is_answer).float() * STEP_COST
        return Judgement(is_answer, is_right, is_over, bonus)

    def _succeeded(self) -> Tensor:
        return (self._num_right == self.num_answers).float()
