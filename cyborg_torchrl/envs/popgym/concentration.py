"""POPGym's Concentration: find pairs of cards that are face down."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor
from torchrl.data import Categorical, MultiCategorical

from cyborg_torchrl.envs.popgym.base import Entries, Outcome, PopgymEnv, Spaces
from cyborg_torchrl.envs.popgym.cards import CARDS, KINDS


class ConcentrationEnv(PopgymEnv):
    """Concentration: cards are turned over one by one, and two of a kind stay face up.

    - Observation, [N, cards] integer: the kind of each card that is face up, and the number of kinds for all others.
      The card of this step is always shown, and so is the first card of a turn at its second one.
    - Action, [N] integer in [0, cards): the card to turn over.
    - Reward, with T steps: 2 / cards for a pair; -2 / T for two different cards or twice the same one. A card that is
      face up already ends the turn; that costs 1 / T for each card of the turn. The first card of a turn is free.
    - The last pair terminates the episode. It is truncated after T steps, the ceiling of 2 c - c / (2 c - 1) for c
      cards; both may be true.

    | level | decks of 52 cards | a kind is |
    |---|---|---|
    | Easy | 1 | a colour |
    | Medium | 2 | a colour |
    | Hard | 1 | a rank |
    """

    levels = {
        "Easy": {"num_decks": 1, "kind": "colors"},
        "Medium": {"num_decks": 2, "kind": "colors"},
        "Hard": {"num_decks": 1, "kind": "ranks"},
    }
    num_decks: int
    kind: str

    def spaces(self) -> Spaces:
        """Return the specs and the length that follow from the level."""
        cards, (_, kinds) = CARDS * self.num_decks, KINDS[self.kind]
        steps = math.ceil(2 * cards - cards / (2 * cards - 1))
        return Spaces(MultiCategorical([kinds + 1] * cards), Categorical(cards), steps)

    def _prepare_tables(self) -> None:
        cards, (_, kinds) = CARDS * self.num_decks, KINDS[self.kind]
        self._first_card = self._first(cards)
        self._num_kinds, self._zero, self._no_card = torch.tensor([kinds, 0, -1], device=self.device)
        verdicts = [_verdict(*case, cards, self._num_steps) for case in product((False, True), repeat=4)]
        rewards, changes = zip(*verdicts, strict=True)
        self._rewards, self._changes = self._constant(*rewards), torch.tensor(changes, device=self.device)

    def _draw(self, count: int) -> Entries:
        return {"table": self._permutations(count, CARDS * self.num_decks)}

    def _prepare(self, drawn: Entries) -> Entries:
        kind = KINDS[self.kind][0](drawn["table"]) - self._num_kinds
        return {
            # Kinds are negative in these two, so that 0 is a card that is face down.
            "kind": kind,
            "view": torch.zeros_like(kind),
            "observation": torch.zeros_like(kind) + self._num_kinds,
            "turned": self._no_card.repeat(len(kind)),
            "left": kind.new_full((len(kind), 1), kind.shape[1]),
        }

    def _play(self, action: Tensor, entries: Entries) -> Outcome:
        kinds, view, turned = entries["kind"], entries["view"].view(-1), entries["turned"]
        card = self._first_card + action
        is_first = turned == self._no_card
        other = torch.where(is_first, card, turned)
        kind, other_kind = kinds.take(card), kinds.take(other)
        case = _number(is_first, turned == card, view.take(card) == self._zero, kind == other_kind)
        keeps, keeps_other, is_turned, not_turned, pairs = self._changes.index_select(0, case).unbind(1)
        view.index_copy_(0, card, kind)
        observation = entries["view"] + self._num_kinds
        view.index_copy_(0, card, kind * keeps)
        view.index_copy_(0, other, other_kind * keeps_other)
        left = entries["left"] - pairs.unsqueeze(1)
        entries.update(observation=observation, left=left, turned=torch.addcmul(not_turned, card, is_turned))
        return Outcome(self._rewards.take(case).unsqueeze(1), left == self._zero)


def _verdict(
    is_first: bool, is_same: bool, is_hidden: bool, is_alike: bool, cards: int, steps: int
) -> tuple[float, tuple[int, ...]]:
    """Return the reward of a card that is turned over, and the changes that follow.

    Args:
        is_first: no other card of this turn was turned over.
        is_same: the other card of this turn is the same one.
        is_hidden: the card was face down.
        is_alike: the other card of this turn has the same kind.
        cards: number of cards.
        steps: steps of an episode.

    Returns:
        The reward, and five integers: whether the card stays face up, whether the other one does, whether the turn
        continues with this card, that minus 1, and the number of cards that are found.
    """
    if not is_hidden and not is_same:  # it was found before
        return -(1 if is_first else 2) / steps, (1, int(is_first), 0, -1, 0)
    if is_first:
        return 0.0, (1, 1, 1, 0, 0)
    if is_alike and not is_same:
        return 2 / cards, (1, 1, 0, -1, 2)
    return -2 / steps, (0, 0, 0, -1, 0)


def _number(*flags: Tensor) -> Tensor:
    """Return the integers [N] whose binary digits are flags, [N] bool each, the highest digit first."""
    number = flags[0].view(torch.uint8)
    for flag in flags[1:]:
        number = torch.add(flag.view(torch.uint8), number, alpha=2)
    return number.long()
