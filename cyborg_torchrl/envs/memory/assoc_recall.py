"""`assoc_recall`: see pairs of key and value, wait, and name the value of one key."""

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


@register_environment("assoc_recall")
@register_environment("associative_recall")
class AssocRecallEnv(MemoryTask):
    """Associative recall, batched on one device.

    An episode lasts `pairs + horizon + 1` steps: the pairs one by one, `horizon` blank steps, the query.

    - Observation, [N, pairs + values + 1] float: a pair is its key and its value, each as one-hot; a blank step is all
      zero; the query is the one-hot of a key, with the query flag (last entry).
    - Keys are the numbers from 0 to pairs - 1 in an order drawn for each episode; values are drawn with replacement,
      and so is the key that is asked for.
    - Action, [N] integer in [0, values): the action at the query is the answer; all others are ignored.
    - Reward: +1 for the right answer, -1 for a wrong one, 0 otherwise. The answer terminates the episode.
    - "success", [N, 1] float: 1 where the answer was right.

    Chance is 1 / values.

    Args:
        num_envs: N, environments side by side.
        pairs: number of pairs, 1 or more; None: the level's.
        values: number of different values, 2 or more.
        horizon: blank steps between the last pair and the query, 0 or more; None: the level's.
        level: easy (the default), medium, hard or extreme.
        device: where it runs.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or no integer, or the level unknown.
    """

    levels = {
        "easy": Level(50, 4, 0.90),
        "medium": Level(200, 8, 0.85),
        "hard": Level(800, 12, 0.75),
        "extreme": Level(3000, 20, 0.65),
    }
    default = levels["easy"]

    def __init__(
        self,
        num_envs: int = 64,
        *,
        pairs: int | None = None,
        values: int = 4,
        horizon: int | None = None,
        level: str | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        horizon, pairs = self.choose(level, horizon, pairs)
        check_least(num_envs=(num_envs, 1), pairs=(pairs, 1), values=(values, 2), horizon=(horizon, 0))
        super().__init__(
            num_envs,
            horizon,
            features=pairs + values + 1,
            actions=values,
            num_answers=1,
            max_episode_steps=pairs + horizon + 1,
            device=device,
            seed=seed,
        )
        self.pairs, self.values = pairs, values

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

    def _judge(self, action: Tensor, time: Tensor, latents: Latents) -> Judgement:
        is_query = time == self.max_episode_steps - 1
        answer = at(latents["value_of"], latents["asked"])
        return Judgement(is_query, is_query & (action == answer), is_query)

    def oracle(self) -> ReferencePolicy:
        """Keeps all pairs."""
        return PairsOracle(self.pairs, self.values)

    def memoryless(self) -> ReferencePolicy:
        """One fixed answer, right by chance, 1 / values."""
        return ConstantAnswer()


class PairsOracle(ReferencePolicy):
    """Keeps the pairs of each environment in a table; a key without a value is a question.

    Args:
        pairs: width of the keys, with which an observation begins.
        values: width of the values, which come next.
    """

    def __init__(self, pairs: int, values: int) -> None:
        super().__init__()
        self.pairs, self.values = pairs, values
        self._table: Tensor | None = None

    def act(self, observation: Tensor) -> Tensor:
        """The value of the key that is shown."""
        key, value = observation[..., : self.pairs], observation[..., self.pairs : self.pairs + self.values]
        if self._table is None or self._table.shape[:-2] != key.shape[:-1]:
            self._table = observation.new_zeros(*key.shape, self.values)
        is_pair = (value.sum(-1) > 0)[..., None, None] & (key > 0).unsqueeze(-1)
        self._table = torch.where(is_pair, value.unsqueeze(-2), self._table)
        return (self._table * key.unsqueeze(-1)).sum(-2).argmax(-1)
