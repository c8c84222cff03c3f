"""Runs on disk: what each folder holds, and in what state it was left."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Status = Literal["finished", "interrupted", "unfinished", "failed", "broken", "repeated"]
Columns = dict[str, NDArray[np.float64]]
"""Columns of a table of numbers, [rows] each; nan where a cell is empty."""


class ReportError(ValueError):
    """Input that there can be no report of; the message is one line."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    path: Path
    status: Status
    note: str = ""
    """What is wrong with it, in one sentence, or where it was resumed."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    manifest: dict[str, Any] = field(default_factory=dict[str, Any])
    summary: dict[str, Any] = field(default_factory=dict[str, Any])
    metrics: Columns = field(default_factory=dict[str, NDArray[np.float64]])

    @property
    def seed(self) -> int | None:
        """The training seed."""
        return self.config.get("train", {}).get("seed")

    @property
    def steps(self) -> int:
        """Environment steps that were trained on."""
        logged = self.metrics.get("steps")
        known = self.summary.get("total_timesteps")
        return int(known) if known is not None else int(logged[-1]) if logged is not None and len(logged) else 0

    @property
    def measure(self) -> str:
        """What its score is: "success", or "return" where the task knows no success."""
        if number(self.summary.get("success_rate")) is not None or has_numbers(self.metrics.get("success_rate")):
            return "success"
        return "return"

    @property
    def score(self) -> float | None:
        """Success, or return, at the end of a finished run; None for others, and where it is no number."""
        key = "success_rate" if self.measure == "success" else "mean_reward"
        return number(self.summary.get(key)) if self.status == "finished" else None

    @property
    def learning(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Environment steps, and the score of the episodes that ended in training there."""
        column = self.metrics.get("success_rate" if self.measure == "success" else "mean_reward")
        if column is None or "steps" not in self.metrics:
            return np.empty(0), np.empty(0)
        is_known = np.isfinite(column) & np.isfinite(self.metrics["steps"])
        return self.metrics["steps"][is_known], column[is_known]


def number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if isinstance(value, (int, float)) and np.isfinite(value) else None


def has_numbers(column: NDArray[np.float64] | None) -> bool:
    """Whether a column is there and holds any number."""
    return column is not None and bool(np.isfinite(column).any())


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs in and below the given folders, each once, in the order of their paths.

    Of several finished runs with the same configuration and seed the latest counts; the others are "repeated".

    Raises:
        ReportError: if a path is no folder, or there is no run in it.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            what = "is a file" if path.exists() else "is not there"
            raise ReportError(f"'{path}' {what}: give a run's folder, or a folder of runs such as a sweep's.")
        folders = run_folders(path)
        if not folders:
            raise ReportError(
                f"no run in '{path}': a run's folder holds manifest.json and logs/metrics.csv; give one, or a folder "
                "above some, such as a sweep's."
            )
        found |= {folder.resolve(): read_run(folder) for folder in folders}
    return _without_repetitions(list(found.values()))


def run_folders(path: Path) -> list[Path]:
    """Folders of runs in and below a folder, sorted; nothing is looked for inside of a run."""
    folders: list[Path] = []
    for name, inner, files in os.walk(path):
        is_run = "manifest.json" in files or "summary.json" in files or ("config.yaml" in files and "logs" in inner)
        inner[:] = [] if is_run else sorted(folder for folder in inner if not folder.startswith("."))
        if is_run:
            folders.append(Path(name))
    return folders


def read_run(path: Path) -> Run:
    """Reads a run's folder, whatever state it is in."""
    wrong: list[str] = []
    config = _read(path / "config.yaml", wrong)
    manifest = _read(path / "manifest.json", wrong)
    summary = _read(path / "summary.json", wrong, is_needed=False)
    metrics = _read_metrics(path / "logs" / "metrics.csv", wrong)
    run = Run(path, "finished", "", config, manifest, summary, metrics)
    if wrong:
        return replace(run, status="broken", note=" ".join(wrong))
    if not summary:
        return replace(run, status="unfinished", note=f"No summary.json: it ended, or is, at step {run.steps:,}.")
    if summary.get("is_interrupted"):
        return replace(run, status="interrupted", note=f"Interrupted at step {run.steps:,}.")
    if run.score is None:
        return replace(run, status="broken", note="Its summary.json holds no score.")
    resumed: list[dict[str, Any]] = manifest.get("resumed") or []
    return replace(run, note=" ".join(f"Resumed after update {again.get('update')}." for again in resumed))


def _read(path: Path, wrong: list[str], *, is_needed: bool = True) -> dict[str, Any]:
    """A mapping from a YAML or JSON file; {}, with a sentence in `wrong`, if there is none."""
    if not path.is_file():
        if is_needed:
            wrong.append(f"There is no {path.name}.")
        return {}
    try:
        content: Any = (
            OmegaConf.to_container(OmegaConf.load(path)) if path.suffix == ".yaml" else json.loads(path.read_text())
        )
    except (ValueError, OSError, yaml.YAMLError, OmegaConfBaseException):
        content = None
    if not isinstance(content, dict):
        wrong.append(f"{path.name} cannot be read.")
        return {}
    return {str(key): value for key, value in content.items()}


def _read_metrics(path: Path, wrong: list[str]) -> Columns:
    """The columns of metrics.csv. A last line that was cut off is left out."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in row.values() and None not in row]
            return {
                name: np.array([float(row[name] or "nan") for row in rows], dtype=np.float64)
                for name in reader.fieldnames or ()
            }
    except FileNotFoundError:
        wrong.append("There is no logs/metrics.csv.")
    except (ValueError, OSError, csv.Error):
        wrong.append("logs/metrics.csv cannot be read.")
    return {}


def identity(config: dict[str, Any]) -> str:
    """What tells runs apart that are to be counted apart: all but where and how they were logged."""
    return json.dumps({key: value for key, value in config.items() if key != "logger"}, sort_keys=True, default=str)


def _without_repetitions(runs: list[Run]) -> list[Run]:
    latest: dict[str, Run] = {}
    for run in runs:
        before = latest.get(identity(run.config))
        if run.status == "finished" and (before is None or _started(run) >= _started(before)):
            latest[identity(run.config)] = run
    counted = {id(run) for run in latest.values()}
    note = "The same configuration and seed were run again later."
    return [
        replace(run, status="repeated", note=note) if run.status == "finished" and id(run) not in counted else run
        for run in runs
    ]


def _started(run: Run) -> str:
    return str(run.manifest.get("started", ""))
