"""Runs on disk: the content of each folder, and whether the run finished."""

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

from cyborg_torchrl.memory_benchmarks.results import JOB_FILE, UNFINISHED, read_jobs

Status = Literal["finished", "interrupted", "unfinished", "failed", "broken", "repeated"]
Array = NDArray[np.float64]
Columns = dict[str, Array]
"""Columns of a table of numbers, each [rows]; NaN for an empty cell."""


class ReportError(ValueError):
    """Input that no report can be made of. The message is one line."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    path: Path
    status: Status
    note: str = ""
    """Why the run does not count, in one sentence, or where it was resumed."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    manifest: dict[str, Any] = field(default_factory=dict[str, Any])
    summary: dict[str, Any] = field(default_factory=dict[str, Any])
    metrics: Columns = field(default_factory=dict[str, Array])

    @property
    def seed(self) -> int | None:
        """The training seed."""
        return self.config.get("train", {}).get("seed")

    @property
    def steps(self) -> int:
        """Environment steps of the training so far."""
        logged = self.metrics.get("steps", np.empty(0))
        return int(self.summary.get("total_timesteps") or (logged[-1] if len(logged) else 0))

    @property
    def measure(self) -> str:
        """The kind of its score: "success", or "return" if the task reports no success."""
        has_success = self.figure("success_rate") is not None or has_numbers(self.metrics.get("success_rate"))
        return "success" if has_success else "return"

    @property
    def score(self) -> float | None:
        """Success, or return, at the end of a finished run; None for other runs, and for NaN."""
        return self.figure(self._score_key) if self.status == "finished" else None

    @property
    def learning(self) -> tuple[Array, Array]:
        """Environment steps, and the score of the episodes that ended in training at that time, both [P]."""
        steps, scores = self.metrics.get("steps"), self.metrics.get(self._score_key)
        if steps is None or scores is None:
            return np.empty(0), np.empty(0)
        is_known = np.isfinite(scores) & np.isfinite(steps)
        return steps[is_known], scores[is_known]

    @property
    def _score_key(self) -> str:
        return "success_rate" if self.measure == "success" else "mean_reward"

    def figure(self, name: str) -> float | None:
        """Return a number of the summary; None if it is missing or not finite."""
        value = self.summary.get(name)
        return float(value) if isinstance(value, (int, float)) and np.isfinite(value) else None


def has_numbers(column: Array | None) -> bool:
    """Return whether a column exists and holds a finite number."""
    return column is not None and bool(np.isfinite(column).any())


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """Return the runs in and below the given folders, each once, in the order of their paths.

    If a configuration and seed finished several times, the latest run counts. The others are "repeated".

    Raises:
        ReportError: if a path is not a folder, or contains no run.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            problem = "is a file" if path.exists() else "is not there"
            raise ReportError(f"'{path}' {problem}: give a run's folder, or a folder of runs such as a sweep's.")
        folders = run_folders(path)
        if not folders:
            raise ReportError(
                f"no run in '{path}': a run's folder holds manifest.json and logs/metrics.csv; give one, or a folder "
                "above some, such as a sweep's."
            )
        runs |= {folder.resolve(): read_run(folder) for folder in folders}
    return _mark_repeated(list(runs.values()))


def run_folders(path: Path) -> list[Path]:
    """Return the folders of runs in and below a folder, sorted. Folders inside a run are not searched."""
    folders: list[Path] = []
    for name, inner, files in os.walk(path):
        is_run = not {"manifest.json", "summary.json", JOB_FILE}.isdisjoint(files)
        is_run |= "config.yaml" in files and "logs" in inner
        inner[:] = [] if is_run else sorted(folder for folder in inner if not folder.startswith("."))
        if is_run:
            folders.append(Path(name))
    return folders


def read_run(path: Path) -> Run:
    """Read a run's folder, whatever its state."""
    problems: list[str] = []
    config = _read_mapping(path / "config.yaml", problems)
    manifest = _read_mapping(path / "manifest.json", problems)
    summary = _read_mapping(path / "summary.json", problems, is_required=False)
    metrics = _read_metrics(path / "logs" / "metrics.csv", problems)
    run = Run(path, "finished", "", config, manifest, summary, metrics)
    if problems or not summary:
        job = read_jobs(path.glob(JOB_FILE)).get(path)  # the sweep's note on this run
        if job is not None and job.error not in ("", UNFINISHED):
            return replace(run, status="failed", note=f"Failed: {job.error}", config=config or job.config)
        if job is not None and not (config or manifest or summary or metrics):
            return replace(run, status="unfinished", note="It did not start.", config=job.config)
    if problems:
        return replace(run, status="broken", note=" ".join(problems))
    if not summary:
        return replace(run, status="unfinished", note=f"No summary.json: it ended, or is, at step {run.steps:,}.")
    if summary.get("is_interrupted"):
        return replace(run, status="interrupted", note=f"Interrupted at step {run.steps:,}.")
    if run.score is None:
        return replace(run, status="broken", note="Its summary.json holds no score.")
    resumed: list[dict[str, Any]] = manifest.get("resumed") or []
    return replace(run, note=" ".join(f"Resumed after update {start.get('update')}." for start in resumed))


def _read_mapping(path: Path, problems: list[str], *, is_required: bool = True) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file; {} if there is none, with a sentence in `problems`."""
    if not path.is_file():
        if is_required:
            problems.append(f"There is no {path.name}.")
        return {}
    try:
        is_yaml = path.suffix == ".yaml"
        content: Any = OmegaConf.to_container(OmegaConf.load(path)) if is_yaml else json.loads(path.read_text())
    except (ValueError, OSError, yaml.YAMLError, OmegaConfBaseException):
        content = None
    if not isinstance(content, dict):
        problems.append(f"{path.name} cannot be read.")
        return {}
    return {str(key): value for key, value in content.items()}


def _read_metrics(path: Path, problems: list[str]) -> Columns:
    """Return the columns of metrics.csv. A last line that was cut off is left out."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in row.values() and None not in row]
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in reader.fieldnames or ()}
    except FileNotFoundError:
        problems.append("There is no logs/metrics.csv.")
    except (ValueError, OSError, csv.Error):
        problems.append("logs/metrics.csv cannot be read.")
    return {}


def _mark_repeated(runs: list[Run]) -> list[Run]:
    """Return the runs, where only the latest finished run of a configuration and seed stays "finished"."""
    finished = [run for run in runs if run.status == "finished"]
    finished.sort(key=lambda run: str(run.manifest.get("started", "")))
    latest = {_identity(run): run.path for run in finished}
    note = "The same configuration and seed were run again later."
    return [
        replace(run, status="repeated", note=note)
        if run.status == "finished" and latest[_identity(run)] != run.path
        else run
        for run in runs
    ]


def _identity(run: Run) -> str:
    """Return the configuration without its logging options: equal for repetitions of a run."""
    return json.dumps({key: run.config[key] for key in run.config if key != "logger"}, sort_keys=True, default=str)
