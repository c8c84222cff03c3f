"""`n_back`: is this symbol the one that was shown n steps ago?"""

from __future__ import annotations

import torch
from torch import Tensor

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


@register_environment("n_back")
class NBackEnv(MemoryTask):
    """N-back, batched on one device.

    An episode lasts `n + horizon` steps, and shows a symbol at each. From the step n on each is a question: is this the
    symbol of n steps ago? There are no blank steps: what is in between is what distracts, and `horizon` is the number
    of questions.

    - Observation, [N, symbols + 1] float: the symbol as one-hot, and the question flag (last entry).
    - Half of the questions are matches, drawn each by itself; a symbol that is no match is any of the others.
    - Action, [N] integer: 1 for a match, 0 for none; ignored before the step n.
    - Reward: +1 for a right answer, -1 for a wrong one. The last answer terminates the episode.
    - "success", [N, 1] float: share of right answers.

    Chance is 1 / 2.

    Args:
        num_envs: N, environments side by side.
        n: how far back, 1 or more; None: the level's.
        symbols: number of different symbols, 2 or more.
        horizon: number of questions, 1 or more; None: the level's.
        level: easy (the default), medium, hard or extreme.
        device: where it runs.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or no integer, or the level unknown.

    Source: Kirchner (1958).
    """

    levels = {
        "easy": Level(100, 2, 0.85),
        "medium": Level(300, 3, 0.80),
        "hard": Level(1000, 4, 0.70),
        "extreme": Level(5000, 5, 0.60),
    }
    default = levels["easy"]

    def __init__(
        self,
        num_envs: int = 64,
        *,
        n: int | None = None,
        symbols: int = 4,
        horizon: int | None = None,
        level: str | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        horizon, n = self.choose(level, horizon, n)
        check_least(num_envs=(num_envs, 1), n=(n, 1), symbols=(symbols, 2), horizon=(horizon, 1))
        super().__init__(
            num_envs,
            horizon,
            features=symbols + 1,
            actions=2,
            num_answers=horizon,
            max_episode_steps=n + horizon,
            device=device,
            seed=seed,
        )
        self.n, self.symbols = n, symbols

    def _draw(self) -> Latents:
        rounds = -(-self.max_episode_steps // self.n)
        step = self.randint(self.symbols - 1, rounds, self.n) + 1  # to another symbol
        is_match = self.randint(2, rounds, self.n) > 0
        step[:, 1:] *= ~is_match[:, 1:]
        step[:, 0] = self.randint(self.symbols, self.n)
        # each of the n interleaved streams is a walk over the symbols that stays where there is a match
        return {"symbol": step.cumsum(1).remainder(self.symbols).flatten(1)}

    def _show(self, time: Tensor, latents: Latents) -> Tensor:
        symbol = one_hot(at(latents["symbol"], time), self.symbols)
        return torch.cat([symbol, (time >= self.n).float().unsqueeze(-1)], -1)

    def _judge(self, action: Tensor, time: Tensor, latents: Latents) -> Judgement:
        is_question = time >= self.n
        is_match = at(latents["symbol"], time) == at(latents["symbol"], time - self.n)
        is_right = is_question & ((action == 1) == is_match)
        return Judgement(is_question, is_right, time == self.max_episode_steps - 1)

    def oracle(self) -> ReferencePolicy:
        """Keeps the last n symbols."""
        return _Oracle(self.n, self.symbols)

    def memoryless(self) -> ReferencePolicy:
        """Never a match: right by chance, 1 / 2."""
        return ConstantAnswer()


class _Oracle(ReferencePolicy):
    """Keeps the last n symbols of each environment."""

    def __init__(self, n: int, symbols: int) -> None:
        super().__init__()
        self.n, self.symbols = n, symbols
        self._last: Tensor | None = None

    def act(self, observation: Tensor) -> Tensor:
        symbol = observation[..., : self.symbols].argmax(-1)
        if self._last is None or self._last.shape[:-1] != symbol.shape:
            self._last = torch.zeros(*symbol.shape, self.n, dtype=torch.long, device=symbol.device)
        is_match = self._last[..., 0] == symbol
        self._last = torch.cat([self._last[..., 1:], symbol.unsqueeze(-1)], -1)
        return is_match.long()
