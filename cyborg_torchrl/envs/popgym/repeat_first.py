"""POPGym's RepeatFirst: name the suit of the first card."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.data import Categorical

from cyborg_torchrl.envs.popgym.base import Entries, Spaces
from cyborg_torchrl.envs.popgym.cards import SUITS, PredictionGame, suits


class RepeatFirstEnv(PredictionGame):
    """RepeatFirst: cards are shown one by one, and the answer is always the suit of the first one.

    - Observation, [N] integer in [0, 4): the suit of the card that is dealt.
    - Action, [N] integer in [0, 4): the suit of the first card of the episode.
    - Reward: 1 / (cards - 1) for a right answer, as much off for a wrong one.
    - The last card terminates the episode, after cards - 1 steps.

    | level | decks of 52 cards |
    |---|---|
    | Easy | 1 |
    | Medium | 8 |
    | Hard | 16 |

    popgym's documentation promises a mark of the first card. In its code there is none, and none is here.
    """

    levels = {"Easy": {"num_decks": 1}, "Medium": {"num_decks": 8}, "Hard": {"num_decks": 16}}

    def spaces(self) -> Spaces:
        """Return the specs and the length that follow from the level."""
        return Spaces(Categorical(SUITS), Categorical(SUITS), self.num_cards - 1)

    def _deal(self, *decks: Tensor) -> Entries:
        suit = suits(decks[0])
        stake = torch.full(suit.shape, 1 / (self.num_cards - 1), device=suit.device)
        return {"observation": suit, "answer": suit[:, :1].repeat(1, self.num_cards), "stake": stake}
