"""POPGym's CountRecall: say how often a card was dealt."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.data import Categorical, MultiCategorical

from cyborg_torchrl.envs.popgym.base import Entries, Spaces
from cyborg_torchrl.envs.popgym.cards import KINDS, PredictionGame


class CountRecallEnv(PredictionGame):
    """CountRecall: cards are dealt from one shuffled deck, and another shuffled deck has the questions.

    - Observation, [N, 2] integer: the kind of the card that is dealt, and the kind in question.
    - Action, [N] integer in [0, cards / kinds]: how many cards of the kind in question were dealt so far, this step
      included.
    - Reward: 1 / (cards - 1) for the right number, as much off for any other.
    - The last card terminates the episode, after cards - 1 steps.

    | level | decks of 52 cards | a kind is |
    |---|---|---|
    | Easy | 1 | a colour |
    | Medium | 2 | a suit |
    | Hard | 4 | a rank |

    popgym's option `error_clamp` has no effect in its code, and does not exist here.
    """

    levels = {
        "Easy": {"num_decks": 1, "kind": "colors"},
        "Medium": {"num_decks": 2, "kind": "suits"},
        "Hard": {"num_decks": 4, "kind": "ranks"},
    }
    kind: str
    num_shuffles = 2

    def spaces(self) -> Spaces:
        """Return the specs and the length that follow from the level."""
        _, kinds = KINDS[self.kind]
        return Spaces(MultiCategorical([kinds, kinds]), Categorical(self.num_cards // kinds + 1), self.num_cards - 1)

    def _deal(self, *decks: Tensor) -> Entries:
        kind_of, kinds = KINDS[self.kind]
        dealt, asked = (kind_of(deck) for deck in decks)
        counts = (dealt.unsqueeze(-1) == torch.arange(kinds, device=dealt.device)).cumsum(1)
        answer = counts.gather(-1, asked.unsqueeze(-1)).squeeze(-1)
        stake = torch.full(dealt.shape, 1 / (self.num_cards - 1), device=dealt.device)
        return {"observation": torch.stack((dealt, asked), -1), "answer": answer, "stake": stake}
