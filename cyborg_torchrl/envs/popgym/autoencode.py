"""POPGym's Autoencode: repeat all cards in reverse order."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.data import Categorical, Composite

from cyborg_torchrl.envs.popgym.base import Entries, Spaces
from cyborg_torchrl.envs.popgym.cards import SUITS, PredictionGame, suits


class AutoencodeEnv(PredictionGame):
    """Autoencode: all cards are shown one by one, and then their suits are the answers, the last card first.

    - Observation: "0", [N] integer, is 1 while cards are shown and 0 while answers are due. "1", [N] integer in
      [0, 4), is the suit of the card, and 0 once the first answer was given.
    - Action, [N] integer in [0, 4): the suit of the next card in reverse order; ignored while cards are shown.
    - Reward: 1 / cards for a right answer, as much off for a wrong one.
    - The last answer terminates the episode, after 2 cards - 1 steps.

    | level | decks of 52 cards |
    |---|---|
    | Easy | 1 |
    | Medium | 2 |
    | Hard | 3 |

    The last card is shown with the mark 0, since its answer is due at once. Suit 0 and "no card" look the same, which
    is a fault of popgym. With `fixed`, "no card" is 4.
    """

    levels = {"Easy": {"num_decks": 1}, "Medium": {"num_decks": 2}, "Hard": {"num_decks": 3}}

    def spaces(self) -> Spaces:
        """Return the specs and the length that follow from the level."""
        observation = Composite({"0": Categorical(2), "1": Categorical(SUITS + self.fixed)})
        return Spaces(observation, Categorical(SUITS), 2 * self.num_cards - 1)

    def _deal(self, *decks: Tensor) -> Entries:
        suit = suits(decks[0])
        is_shown = torch.ones_like(suit)
        is_shown[:, -1] = 0
        unasked = suit[:, :-1]
        stake = torch.full(suit.shape, 1 / self.num_cards, device=suit.device)
        return {
            "observation.0": is_shown,
            "observation.1": torch.nn.functional.pad(suit, (0, self.num_cards), value=SUITS if self.fixed else 0),
            "answer": torch.cat((unasked, suit.flip(1)), 1),
            "stake": torch.cat((torch.zeros_like(unasked, dtype=stake.dtype), stake), 1),
        }
