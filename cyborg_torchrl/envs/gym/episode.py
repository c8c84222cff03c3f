"""What an episode of a gymnasium environment follows from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Episode:
    """All that an environment's present episode follows from, and what it has come to.

    Its seed is the stream's own number for the first episode of the stream, and drawn from that and the episode's
    number for those that follow.
    """

    stream: int
    number: int = -1
    actions: list[Any] = field(default_factory=list)
    observation: Any = None
    """The last one; None before the first reset."""

    @property
    def seed(self) -> int:
        """What the environment is reset with."""
        if self.number == 0:
            return self.stream
        return int(np.random.SeedSequence([self.stream, self.number]).generate_state(1)[0])

    @property
    def has_begun(self) -> bool:
        """There was a reset."""
        return self.number >= 0

    @property
    def fingerprint(self) -> str:
        """A digest of the last observation."""
        return fingerprint(self.observation)

    def begin(self, stream: int | None) -> None:
        """Turns to the next episode, or to the first of another stream."""
        self.number = self.number + 1 if stream is None else 0
        self.stream = self.stream if stream is None else stream
        self.actions = []


def fingerprint(observation: Any) -> str:
    """A digest of an observation: arrays and numbers, in any nest of mappings and sequences."""
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
