"""`copy_memory`: see a sequence of symbols, wait, and repeat it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cyborg_torchrl.envs.memory.task import (
    Latents,
    Memory,
    QuestionTask,
    Sizes,
    at,
    four_levels,
    one_hot,
    recall,
    recall_value,
)
from cyborg_torchrl.registry import register_environment


class SequenceTask(QuestionTask):
    """A task that shows a sequence of symbols, waits, and asks for the symbol of each position.

    A subclass may ask in another order than that of the sequence (`_asked`).
    """

    sequence: int
    symbols: int
    show_position = True
    measure = "sequence"
    least = {"sequence": 1, "symbols": 2, "horizon": 0}

    def sizes(self) -> Sizes:
        """Return the sizes that follow from the options."""
        features = self.sequence * self.show_position + self.symbols + 1
        steps = 2 * self.sequence + self.horizon
        return Sizes(features, actions=self.symbols, answers=self.sequence, steps=steps)

    def _asked(self, time: Tensor, latents: Latents) -> Tensor:
        """Return the positions [N] of the questions at the steps `time`; any before the first question."""
        return time - self.first_question

    def _draw(self) -> Latents:
        return {"symbol": self.randint(self.symbols, self.sequence)}

    def _show(self, time: Tensor, latents: Latents) -> Tensor:
        is_symbol, is_question = time < self.sequence, time >= self.first_question
        symbol = one_hot(at(latents["symbol"], time), self.symbols, is_symbol)
        parts = [symbol, is_question.float().unsqueeze(-1)]
        if self.show_position:
            position = torch.where(is_symbol, time, self._asked(time, latents))
            parts.insert(0, one_hot(position, self.sequence, is_symbol | is_question))
        return torch.cat(parts, -1)

    def _answer(self, time: Tensor, latents: Latents) -> Tensor:
        return at(latents["symbol"], self._asked(time, latents))

    def _oracle(self, observation: Tensor, memory: Memory) -> Tensor:
        return recall_value(observation, memory, self.sequence, self.symbols)


@register_environment("copy_memory")
class CopyMemoryEnv(SequenceTask):
    """Copy memory, as a batch of episodes on one device.

    An episode lasts `2 sequence + horizon` steps: the symbols one by one, `horizon` blank steps, and as many questions
    as there were symbols, in the same order.

    - Observation, [N, sequence + symbols + 1] float: at symbols and at questions the position in the sequence as
      one-hot; at symbols the symbol as one-hot; the question flag (last entry). A blank step is all zero.
    - Action, [N] integer in [0, symbols): at question k the answer is the k-th symbol; other actions are ignored.
    - Reward: +1 for a right answer, -1 for a wrong one, 0 otherwise. The last answer terminates the episode.
    - "success", [N, 1] float: share of right answers.

    Chance is 1 / symbols.

    Args:
        num_envs: N, number of environments.
        sequence: number of symbols in an episode, 1 or more; None: the level's.
        symbols: number of different symbols, 2 or more.
        show_position: show the position; without it the agent also has to count.
        horizon: blank steps between the last symbol and the first question, 0 or more; None: the level's.
        level: easy (the default), medium, hard or extreme.
        device: device of all tensors.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or not an integer, or the level is unknown.

    Source: the copying memory task of Arjovsky et al. (2016), after Hochreiter and Schmidhuber (1997), which shows no
    position.
    """

    levels = four_levels((50, 10, 0.90), (200, 20, 0.85), (500, 30, 0.75), (2000, 50, 0.60))
    default = levels["easy"]

    def __init__(
        self,
        num_envs: int = 64,
        *,
        sequence: int | None = None,
        symbols: int = 8,
        show_position: bool = True,
        **shared: Any,
    ) -> None:
        self.show_position = show_position
        super().__init__(num_envs, {"sequence": sequence, "symbols": symbols}, **shared)

    def _oracle(self, observation: Tensor, memory: Memory) -> Tensor:
        if self.show_position:
            return super()._oracle(observation, memory)
        is_symbol = observation[..., : self.symbols].sum(-1) > 0
        is_question = observation[..., -1] > 0
        zero = torch.zeros_like(is_symbol, dtype=torch.long)
        shown, answered = recall(memory, "shown", zero), recall(memory, "answered", zero)
        symbols = recall(memory, "symbols", zero.unsqueeze(-1).expand(-1, self.sequence))
        shown = torch.where(is_symbol & (answered > 0), 0, shown)  # a symbol after answers: a new episode
        answered = torch.where(is_symbol, 0, answered)
        here = one_hot(shown, self.sequence, is_symbol) > 0
        symbols = torch.where(here, observation[..., : self.symbols].argmax(-1, keepdim=True), symbols)
        memory.update(shown=shown + is_symbol, answered=answered + is_question, symbols=symbols)
        return at(symbols, answered)
