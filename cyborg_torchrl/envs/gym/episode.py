"""The seed and the actions of a gymnasium episode, from which it can be replayed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Episode:
    """The present episode of an environment: its seed, its actions and its last observation.

    The first episode of a stream has the stream's number as its seed. The seeds of later episodes are drawn from the
    stream and the number of the episode.
    """

    stream: int
    number: int = -1
    actions: list[Any] = field(default_factory=list)
    observation: Any = None
    """The last observation; None before the first reset."""

    @property
    def seed(self) -> int:
        """The seed of the reset."""
        if self.number == 0:
            return self.stream
        return int(np.random.SeedSequence([self.stream, self.number]).generate_state(1)[0])

    @property
    def script(self) -> tuple[int, list[Any]]:
        """The seed and the actions, from which the episode can be replayed."""
        return self.seed, self.actions

    @property
    def has_begun(self) -> bool:
        """True after the first reset."""
        return self.number >= 0

    @property
    def fingerprint(self) -> str:
        """The digest of the last observation."""
        return fingerprint(self.observation)

    def begin(self, stream: int | None) -> None:
        """Begin the next episode, or the first one of another stream."""
        self.number = self.number + 1 if stream is None else 0
        self.stream = self.stream if stream is None else stream
        self.actions = []


def fingerprint(observation: Any) -> str:
    """Return a digest of an observation: arrays and numbers in nested mappings and sequences."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Mapping):
            for key in sorted(part):
                digest.update(str(key).encode())
                add(part[key])
        elif isinstance(part, (tuple, list)):
            for item in part:
                add(item)
        else:
            digest.update(np.ascontiguousarray(part).tobytes())

    add(observation)
    return digest.hexdigest()
