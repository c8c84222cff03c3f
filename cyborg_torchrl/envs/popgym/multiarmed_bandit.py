"""POPGym's MultiarmedBandit: find the arm that pays most often."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.data import Categorical

from cyborg_torchrl.envs.popgym.base import Entries, Outcome, PopgymEnv, Spaces


class MultiarmedBanditEnv(PopgymEnv):
    """MultiarmedBandit: each arm pays with an unknown probability, drawn evenly from [0, 1) for each episode.

    - Observation, [N] integer: 1 if the last arm has paid, else 0; 0 at first.
    - Action, [N] integer in [0, arms): the arm that is pulled.
    - Reward: 1 / steps if the arm pays, as much off if it does not.
    - The episode is truncated after its steps.

    | level | arms | steps |
    |---|---|---|
    | Easy | 10 | 200 |
    | Medium | 20 | 400 |
    | Hard | 30 | 600 |

    The observation has no action in it, so memory needs the previous action (`transforms.previous_action`).
    """

    levels = {
        "Easy": {"arms": 10, "steps": 200},
        "Medium": {"arms": 20, "steps": 400},
        "Hard": {"arms": 30, "steps": 600},
    }
    arms: int
    steps: int

    def spaces(self) -> Spaces:
        """Return the specs and the length that follow from the level."""
        return Spaces(Categorical(2), Categorical(self.arms), self.steps)

    def _prepare_tables(self) -> None:
        self._rewards = self._constant(-1 / self.steps, 1 / self.steps)
        self._first_arm = self._first(self.arms)

    def _draw(self, count: int) -> Entries:
        return {"chance": torch.rand(count, self.arms, generator=self._generator, device=self.device)}

    def _prepare(self, drawn: Entries) -> Entries:
        chance = drawn["chance"]
        return {"chance": chance, "observation": torch.zeros(len(chance), dtype=torch.long, device=chance.device)}

    def _play(self, action: Tensor, entries: Entries) -> Outcome:
        chance = entries["chance"].take(self._first_arm + action)
        entries["observation"] = pays = (self._random(torch.rand) < chance).long()
        return Outcome(self._rewards.take(pays).unsqueeze(-1), None)
