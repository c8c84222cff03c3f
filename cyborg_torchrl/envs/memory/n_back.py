"""`n_back`: is this symbol the one that was shown n steps ago?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cyborg_torchrl.envs.memory.task import Latents, Memory, QuestionTask, Sizes, at, four_levels, one_hot, recall
from cyborg_torchrl.registry import register_environment


@register_environment("n_back")
class NBackEnv(QuestionTask):
    """N-back, as a batch of episodes on one device.

    An episode lasts `n + horizon` steps and shows one symbol at each. From step n on, each step is a question: is this
    the symbol of n steps ago? There are no blank steps, and `horizon` is the number of questions.

    - Observation, [N, symbols + 1] float: the symbol as one-hot, and the question flag (last entry).
    - Each question is a match with probability 1 / 2. A symbol that does not match is any of the others.
    - Action, [N] integer: 1 for a match, 0 for none; ignored before the step n.
    - Reward: +1 for a right answer, -1 for a wrong one. The last answer terminates the episode.
    - "success", [N, 1] float: share of right answers.

    Chance is 1 / 2.

    Args:
        num_envs: N, number of environments.
        n: how far back, 1 or more; None: the level's.
        symbols: number of different symbols, 2 or more.
        horizon: number of questions, 1 or more; None: the level's.
        level: easy (the default), medium, hard or extreme.
        device: device of all tensors.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or not an integer, or the level is unknown.

    Source: Kirchner (1958).
    """

    levels = four_levels((100, 2, 0.85), (300, 3, 0.80), (1000, 4, 0.70), (5000, 5, 0.60))
    default = levels["easy"]
    n: int
    symbols: int
    measure = "n"
    least = {"n": 1, "symbols": 2, "horizon": 1}

    def __init__(self, num_envs: int = 64, *, n: int | None = None, symbols: int = 4, **shared: Any) -> None:
        super().__init__(num_envs, {"n": n, "symbols": symbols}, **shared)

    def sizes(self) -> Sizes:
        """Return the sizes that follow from the options."""
        return Sizes(features=self.symbols + 1, actions=2, answers=self.horizon, steps=self.n + self.horizon)

    def _draw(self) -> Latents:
        rounds = math.ceil(self.max_episode_steps / self.n)
        step = self.randint(self.symbols - 1, rounds, self.n) + 1  # to another symbol
        is_match = self.randint(2, rounds, self.n) > 0
        step[:, 1:] *= ~is_match[:, 1:]
        step[:, 0] = self.randint(self.symbols, self.n)
        # Steps t, t + n, t + 2n, ... form a walk over the symbols, which does not move at a match.
        return {"symbol": step.cumsum(1).remainder(self.symbols).flatten(1)}

    def _show(self, time: Tensor, latents: Latents) -> Tensor:
        symbol = one_hot(at(latents["symbol"], time), self.symbols)
        return torch.cat([symbol, (time >= self.first_question).float().unsqueeze(-1)], -1)

    def _answer(self, time: Tensor, latents: Latents) -> Tensor:
        is_match = at(latents["symbol"], time) == at(latents["symbol"], time - self.n)
        return is_match.long()

    def _oracle(self, observation: Tensor, memory: Memory) -> Tensor:
        symbol = observation[..., : self.symbols].argmax(-1)
        last = recall(memory, "last", symbol.new_zeros(*symbol.shape, self.n))
        memory["last"] = torch.cat([last[..., 1:], symbol.unsqueeze(-1)], -1)
        return (last[..., 0] == symbol).long()
