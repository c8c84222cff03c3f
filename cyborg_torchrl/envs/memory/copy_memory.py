"""`copy_memory`: see a sequence of symbols, wait, and repeat it."""

from __future__ import annotations

import torch
from torch import Tensor

from cyborg_torchrl.envs.memory.assoc_recall import PairsOracle
from cyborg_torchrl.envs.memory.task import (
    ConstantAnswer,
    Judgement,
    Latents,
    Level,
    MemoryTask,
    ReferencePolicy,
    at,
    check_least,
    one_hot,
)
from cyborg_torchrl.registry import register_environment


@register_environment("copy_memory")
class CopyMemoryEnv(MemoryTask):
    """Copy memory, batched on one device.

    An episode lasts `2 sequence + horizon` steps: the symbols one by one, `horizon` blank steps, and as many questions
    as there were symbols, in the same order.

    - Observation, [N, sequence + symbols + 1] float: the position in the sequence as one-hot, while symbols are shown
      and while they are asked for; the symbol as one-hot while it is shown; the question flag (last entry). A blank
      step is all zero.
    - Action, [N] integer in [0, symbols): at question k the answer is the k-th symbol; other actions are ignored.
    - Reward: +1 for a right answer, -1 for a wrong one, 0 otherwise. The last answer terminates the episode.
    - "success", [N, 1] float: share of right answers.

    Chance is 1 / symbols.

    Args:
        num_envs: N, environments side by side.
        sequence: number of symbols in an episode, 1 or more; None: the level's.
        symbols: number of different symbols, 2 or more.
        show_position: show the position; without it the agent has to count, too.
        horizon: blank steps between the last symbol and the first question, 0 or more; None: the level's.
        level: easy (the default), medium, hard or extreme.
        device: where it runs.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or no integer, or the level unknown.

    Source: the copying memory task of Arjovsky et al. (2016), after Hochreiter and Schmidhuber (1997), which shows no
    position.
    """

    levels = {
        "easy": Level(50, 10, 0.90),
        "medium": Level(200, 20, 0.85),
        "hard": Level(500, 30, 0.75),
        "extreme": Level(2000, 50, 0.60),
    }
    default = levels["easy"]

    def __init__(
        self,
        num_envs: int = 64,
        *,
        sequence: int | None = None,
        symbols: int = 8,
        show_position: bool = True,
        horizon: int | None = None,
        level: str | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        horizon, sequence = self.choose(level, horizon, sequence)
        check_least(num_envs=(num_envs, 1), sequence=(sequence, 1), symbols=(symbols, 2), horizon=(horizon, 0))
        super().__init__(
            num_envs,
            horizon,
            features=sequence * show_position + symbols + 1,
            actions=symbols,
            num_answers=sequence,
            max_episode_steps=2 * sequence + horizon,
            device=device,
            seed=seed,
        )
        self.sequence, self.symbols, self.show_position = sequence, symbols, show_position

    def _draw(self) -> Latents:
        return {"symbol": self.randint(self.symbols, self.sequence)}

    def _show(self, time: Tensor, latents: Latents) -> Tensor:
        question = time - self.sequence - self.horizon
        is_symbol, is_question = time < self.sequence, question >= 0
        symbol = one_hot(at(latents["symbol"], time), self.symbols, is_symbol)
        parts = [symbol, is_question.float().unsqueeze(-1)]
        if self.show_position:
            position = torch.where(is_symbol, time, question)
            parts.insert(0, one_hot(position, self.sequence, is_symbol | is_question))
        return torch.cat(parts, -1)

    def _judge(self, action: Tensor, time: Tensor, latents: Latents) -> Judgement:
        question = time - self.sequence - self.horizon
        is_question = question >= 0
        is_right = is_question & (action == at(latents["symbol"], question))
        return Judgement(is_question, is_right, question == self.sequence - 1)

    def oracle(self) -> ReferencePolicy:
        """Keeps the sequence."""
        return PairsOracle(self.sequence, self.symbols) if self.show_position else _Oracle(self.sequence, self.symbols)

    def memoryless(self) -> ReferencePolicy:
        """One fixed answer, right by chance, 1 / symbols."""
        return ConstantAnswer()


class _Oracle(ReferencePolicy):
    """Counts, and keeps the sequence of each environment."""

    def __init__(self, sequence: int, symbols: int) -> None:
        super().__init__()
        self.sequence, self.symbols = sequence, symbols
        self._kept: Tensor | None = None

    def act(self, observation: Tensor) -> Tensor:
        is_symbol, is_question = observation[..., : self.symbols].sum(-1) > 0, observation[..., -1] > 0
        if self._kept is None or self._kept.shape[:-1] != is_symbol.shape:
            self._kept = observation.new_zeros(*is_symbol.shape, self.sequence, dtype=torch.long)
            self._shown = self._asked = torch.zeros_like(is_symbol, dtype=torch.long)
        self._shown = torch.where(is_symbol & (self._asked > 0), 0, self._shown)  # a new episode
        self._asked = torch.where(is_symbol, 0, self._asked)
        here = one_hot(self._shown, self.sequence, is_symbol) > 0
        self._kept = torch.where(here, observation[..., : self.symbols].argmax(-1, keepdim=True), self._kept)
        answer = at(self._kept, self._asked)
        self._shown, self._asked = self._shown + is_symbol, self._asked + is_question
        return answer
