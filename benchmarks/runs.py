"""A table of training runs in a CSV file, which grows run by run and can be continued."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cyborg_torchrl.training.stats import mean_interval

Row = dict[str, Any]


def train(overrides: Sequence[str], *options: str) -> Row:
    """Train an agent with the command line, and return the run's summary.

    Args:
        overrides: key=value, as on the command line.
        options: other options of `cyborg-torchrl train`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "cyborg_torchrl", "train", *options, *overrides]
        command += [f"logger.base_dir={scratch}", "logger.progress=false", "logger.tensorboard=false"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


class RunTable:
    """Rows of a CSV file, one for each run.

    Args:
        path: the file; it is made by the first row.
        names: the columns that name a run.
        values: the columns that a run is measured by.
    """

    def __init__(self, path: Path, names: Sequence[str], values: Sequence[str]) -> None:
        self.path, self.names, self.values = path, tuple(names), tuple(values)

    def rows(self) -> list[dict[str, str]]:
        """Return all rows; [] if there is no file."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def has(self, *names: object) -> bool:
        """Return whether a run of this name has a row."""
        return tuple(map(str, names)) in {tuple(row[name] for name in self.names) for row in self.rows()}

    def add(self, row: Row) -> None:
        """Append a row."""
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*self.names, *self.values], lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow({name: row[name] for name in (*self.names, *self.values)})
        print(", ".join(f"{name} {row[name]}" for name in (*self.names, *self.values)), file=sys.stderr)

    def column(self, name: str, **wanted: str) -> list[float]:
        """Return a column of the rows that have the wanted values."""
        rows = [row for row in self.rows() if all(row[key] == value for key, value in wanted.items())]
        return [float(row[name]) for row in rows]


def with_interval(scores: Sequence[float]) -> str:
    """Return the mean of scores, with its 95 % interval if there are several: "0.98 [0.95, 1.00]"."""
    values = torch.tensor(scores, dtype=torch.float64)
    interval = mean_interval(values) if len(values) > 1 else None
    return f"{values.mean():.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
