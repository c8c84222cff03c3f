"""POPGym's Concentration: find pairs of cards that are face down."""

from __future__ import annotations

import math

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
        self._face_down = torch.tensor(kinds, device=self.device)
        self._no_card = torch.tensor(-1, device=self.device)
        self._none_left = torch.tensor(0, device=self.device)
        self._pair = self._constant(2 / cards)
        self._free, self._one_lost, self._two_lost = self._constant(0.0, -1 / self._num_steps, -2 / self._num_steps)

    def _draw(self, count: int) -> Entries:
        return {"table": self._permutations(count, CARDS * self.num_decks)}

    def _prepare(self, drawn: Entries) -> Entries:
        table = drawn["table"]
        view = self._face_down.expand_as(table).contiguous()
        return {
            "kind": KINDS[self.kind][0](table),
            "view": view,
            "observation": view,
            "turned": self._no_card.repeat(len(table)),
            "left": table.new_full((len(table), 1), table.shape[1]),
        }

    def _play(self, action: Tensor, entries: Entries) -> Outcome:
        card, turned = self._first_card + action, entries["turned"]
        kind = entries["kind"].take(card)
        is_first = turned == self._no_card
        is_same = turned == card
        # The first card of a turn is visible too, so a visible card that is not it was face up before.
        is_up = (entries["view"].take(card) != self._face_down) ^ is_same
        other = torch.where(is_first, card, turned)
        other_kind = entries["kind"].take(other)
        is_alike = (kind == other_kind) > is_same  # also the first card of a turn
        is_pair = is_alike > (is_first | is_up)
        lost = torch.where(is_first ^ is_up, self._free, self._two_lost)
        lost = torch.where(is_first & is_up, self._one_lost, torch.where(is_up, self._two_lost, lost))

        seen = entries["view"].clone()
        seen.view(-1).index_copy_(0, card, kind)
        view = seen.clone()
        view.view(-1).index_copy_(0, card, torch.where(is_alike | is_up, kind, self._face_down))
        view.view(-1).index_copy_(0, other, torch.where(is_first | (is_alike > is_up), other_kind, self._face_down))
        left = torch.sub(entries["left"], is_pair.unsqueeze(-1).long(), alpha=2)
        turned = torch.where(is_first > is_up, card, self._no_card)
        entries.update(observation=seen, view=view, left=left, turned=turned)
        return Outcome(torch.where(is_pair, self._pair, lost).unsqueeze(-1), left == self._none_left)
