"""POPGym's HigherLower: guess whether the next card is higher or lower."""

from __future__ import annotations

from torch import Tensor
from torchrl.data import Categorical

from cyborg_torchrl.envs.popgym.base import Entries, Spaces
from cyborg_torchrl.envs.popgym.cards import RANKS, PredictionGame, ranks


class HigherLowerEnv(PredictionGame):
    """HigherLower: cards are shown one by one, and the answer compares the next one with the one on show.

    - Observation, [N] integer in [0, 13): the rank of the card that is dealt; the ace is the lowest.
    - Action, [N] integer: 0 if the next rank is higher, 1 if it is lower.
    - Reward: 1 / cards for a right answer, as much off for a wrong one, 0 if both ranks are equal.
    - The last card terminates the episode, after cards - 1 steps.

    | level | decks of 52 cards |
    |---|---|
    | Easy | 1 |
    | Medium | 2 |
    | Hard | 3 |

    No return reaches 1, since there are fewer answers than cards, and equal ranks pay nothing. That is a fault of
    popgym. With `fixed`, an answer pays 1 / pairs of unequal ranks instead.
    """

    levels = {"Easy": {"num_decks": 1}, "Medium": {"num_decks": 2}, "Hard": {"num_decks": 3}}

    def spaces(self) -> Spaces:
        """Return the specs and the length that follow from the level."""
        return Spaces(Categorical(RANKS), Categorical(2), self.num_cards - 1)

    def _deal(self, *decks: Tensor) -> Entries:
        rank = ranks(decks[0])
        present, following = rank[:, :-1], rank[:, 1:]
        is_unequal = (following != present).float()
        stake = is_unequal / (is_unequal.sum(1, keepdim=True) if self.fixed else self.num_cards)
        return {"observation": rank, "answer": (following < present).long(), "stake": stake}
