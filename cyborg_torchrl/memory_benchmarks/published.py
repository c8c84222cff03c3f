"""Published scores to compare with."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

SOURCE = "Morad et al. (2023), Table 3"
"""POPGym: Benchmarking Partially Observable Reinforcement Learning, arXiv 2303.01859."""


class Published(NamedTuple):
    """MMER in the POPGym paper: PPO, 15 million steps, mean of three trials."""

    best: float
    """The best of 13 memory models."""
    agent: str
    """Name of that model."""
    gru: float


@cache
def published_scores() -> dict[str, Published]:
    """Return the published scores of POPGym's ids. Ids whose score we could not read are missing.

    We could not read the paper's table itself. The scores of eight families come from another project's transcription.
    Six of its numbers were known to us before, and they are equal.
    """
    with Path(__file__).with_suffix(".csv").open(newline="") as file:
        return {
            row["id"]: Published(float(row["best"]), row["agent"], float(row["gru"])) for row in csv.DictReader(file)
        }
