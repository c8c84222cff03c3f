"""Card games whose observations and right answers are known as soon as the deck is shuffled."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from cyborg_torchrl import keys
from cyborg_torchrl.envs.popgym.base import Entries, Outcome, PopgymEnv

CARDS, RANKS, SUITS, COLORS = 52, 13, 4, 2
"""Cards of a deck, and the numbers of ranks, suits and colours."""


def ranks(card: Tensor) -> Tensor:
    """Return the ranks of cards, from 0 (ace) to 12 (king); the cards of all decks are counted from 0."""
    return card % CARDS // SUITS


def suits(card: Tensor) -> Tensor:
    """Return the suits of cards, from 0 to 3."""
    return card % SUITS


def colors(card: Tensor) -> Tensor:
    """Return the colours of cards, 0 or 1."""
    return card % COLORS


KINDS = {"ranks": (ranks, RANKS), "suits": (suits, SUITS), "colors": (colors, COLORS)}
"""Functions of a card by their names, with the numbers of their values."""


class PredictionGame(PopgymEnv):
    """A card game in which an action is an answer that changes nothing that follows.

    All observations of an episode, and the rewards of all answers, are computed when it begins. They are kept as films
    [L, N, ...] of L = steps + 1 rows, and all environments read the same row: the clock, modulo L. An episode that
    begins alone is written into its column from the present row on. So a step only reads.

    A subclass implements `_deal` and `spaces`.
    """

    is_prediction = True
    is_terminal = True
    rounds = 4
    num_decks: int
    num_shuffles: ClassVar[int] = 1
    """How often all cards are shuffled for an episode."""

    @property
    def num_cards(self) -> int:
        """The cards in all decks together."""
        return CARDS * self.num_decks

    @abstractmethod
    def _deal(self, *decks: Tensor) -> Entries:
        """Return the films of episodes, [count, up to L, ...], whose end may be missing.

        They are the observations, "answer" (integer), and "stake": a right answer pays it, a wrong one costs it.

        Args:
            decks: [count, num_cards] each: the cards in the order in which they are dealt.
        """

    def _draw(self, count: int) -> Entries:
        names = ("deck", "queries")[: self.num_shuffles]
        return {name: self._permutations(count, self.num_cards) for name in names}

    def _prepare(self, drawn: Entries) -> Entries:
        return {name: self._padded(film) for name, film in self._deal(*drawn.values()).items()}

    def _padded(self, film: Tensor) -> Tensor:
        """Return a film with zeros at its end, [count, L, ...]."""
        missing = self._num_steps + 1 - film.shape[1]
        return torch.cat((film, film.new_zeros(film.shape[0], missing, *film.shape[2:])), 1) if missing else film

    def _play(self, action: Tensor, entries: Entries) -> Outcome:
        row = (self._run.clock - 1) % (self._num_steps + 1)
        return Outcome(entries["reward"][row].gather(1, action.unsqueeze(1)), None)

    def _begin(self, index: Tensor | None, fresh: Entries) -> None:
        entries, row = self._run.entries, self._run.clock % (self._num_steps + 1)
        turned = {name: film.roll(row, 1) if row else film for name, film in fresh.items()}
        films = {name: film.transpose(0, 1).contiguous() for name, film in turned.items()}
        answer, stake = (films.pop(name).unsqueeze(-1) for name in ("answer", "stake"))
        films["reward"] = (-stake).repeat(1, 1, self.action_spec.n).scatter_(-1, answer, stake)
        for name, film in films.items():
            entries[name] = film if index is None else entries[name].index_copy(1, index, film)

    def _observed(self) -> dict[NestedKey, Tensor]:
        row = self._run.clock % (self._num_steps + 1)
        result = {key: self._run.entries[name][row] for key, name in self._seen.items()}
        result[keys.SUCCESS] = self._success
        return result
