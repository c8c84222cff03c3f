"""POPGym's RepeatPrevious: name the suit of an earlier card."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.data import Categorical

from cyborg_torchrl.envs.popgym.base import Entries, Spaces
from cyborg_torchrl.envs.popgym.cards import SUITS, PredictionGame, suits


class RepeatPreviousEnv(PredictionGame):
    """RepeatPrevious: cards are shown one by one, and the answer is the suit of the card `k - 1` steps ago.

    - Observation, [N] integer in [0, 4): the suit of the card that is dealt.
    - Action, [N] integer in [0, 4): the suit of the k-th last card, counting the card on show as the first.
    - Reward: 1 / (cards - k) for a right answer, as much off for a wrong one, 0 before the k-th card.
    - The last card terminates the episode, after cards - 1 steps.

    | level | decks of 52 cards | k |
    |---|---|---|
    | Easy | 1 | 4 |
    | Medium | 2 | 32 |
    | Hard | 3 | 64 |

    popgym's documentation calls k = 1 the previous card. In its code that is the card on show, and so it is here.
    """

    levels = {
        "Easy": {"num_decks": 1, "k": 4},
        "Medium": {"num_decks": 2, "k": 32},
        "Hard": {"num_decks": 3, "k": 64},
    }
    k: int

    def spaces(self) -> Spaces:
        """Return the specs and the length that follow from the level."""
        return Spaces(Categorical(SUITS), Categorical(SUITS), self.num_cards - 1)

    def _deal(self, *decks: Tensor) -> Entries:
        suit = suits(decks[0])
        stake = torch.full(suit.shape, 1 / (self.num_cards - self.k), device=suit.device)
        stake[:, : self.k - 1] = 0.0
        return {"observation": suit, "answer": suit.roll(self.k - 1, 1), "stake": stake}
