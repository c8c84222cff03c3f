"""`assoc_recall`: see pairs of key and value, wait, and name the value of one key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cyborg_torchrl.envs.memory.task import Latents, Memory, QuestionTask, Sizes, at, four_levels, one_hot, recall_value
from cyborg_torchrl.registry import register_environment


@register_environment("assoc_recall")
@register_environment("associative_recall")
class AssocRecallEnv(QuestionTask):
    """Associative recall, as a batch of episodes on one device.

    An episode lasts `pairs + horizon + 1` steps: the pairs one by one, `horizon` blank steps, the query.

    - Observation, [N, pairs + values + 1] float: a pair is its key and its value, each as one-hot. A blank step is
      all zero. The query is the one-hot of a key, with the query flag (last entry).
    - Keys are the numbers from 0 to pairs - 1 in random order. Values and the key of the query are drawn with
      replacement.
    - Action, [N] integer in [0, values): the action at the query is the answer; all others are ignored.
    - Reward: +1 for the right answer, -1 for a wrong one, 0 otherwise. The answer terminates the episode.
    - "success", [N, 1] float: 1 if the answer was right.

    Chance is 1 / values.

    Args:
        num_envs: N, number of environments.
        pairs: number of pairs, 1 or more; None: the level's.
        values: number of different values, 2 or more.
        horizon: blank steps between the last pair and the query, 0 or more; None: the level's.
        level: easy (the default), medium, hard or extreme.
        device: device of all tensors.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or not an integer, or the level is unknown.
    """

    levels = four_levels((50, 4, 0.90), (200, 8, 0.85), (800, 12, 0.75), (3000, 20, 0.65))
    default = levels["easy"]
    pairs: int
    values: int
    measure = "pairs"
    least = {"pairs": 1, "values": 2, "horizon": 0}

    def __init__(self, num_envs: int = 64, *, pairs: int | None = None, values: int = 4, **shared: Any) -> None:
        super().__init__(num_envs, {"pairs": pairs, "values": values}, **shared)

    def sizes(self) -> Sizes:
        """Return the sizes that follow from the options."""
        features = self.pairs + self.values + 1
        return Sizes(features, actions=self.values, answers=1, steps=self.pairs + self.horizon + 1)

    def _draw(self) -> Latents:
        return {
            "order": self.permutations(self.pairs),
            "value_of": self.randint(self.values, self.pairs),
            "asked": self.randint(self.pairs),
        }

    def _show(self, time: Tensor, latents: Latents) -> Tensor:
        is_pair, is_query = time < self.pairs, time == self.max_episode_steps - 1
        shown = at(latents["order"], time)
        key = one_hot(torch.where(is_query, latents["asked"], shown), self.pairs, is_pair | is_query)
        value = one_hot(at(latents["value_of"], shown), self.values, is_pair)
        return torch.cat([key, value, is_query.float().unsqueeze(-1)], -1)

    def _answer(self, time: Tensor, latents: Latents) -> Tensor:
        return at(latents["value_of"], latents["asked"])

    def _oracle(self, observation: Tensor, memory: Memory) -> Tensor:
        return recall_value(observation, memory, self.pairs, self.values)
