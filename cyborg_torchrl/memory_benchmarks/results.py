"""Results of a sweep: a file in each run's folder, and a row for each run in results.csv."""

from __future__ import annotations

import csv
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cyborg_torchrl.config import ConfigError
from cyborg_torchrl.registry import UnknownNameError, environments

JOB_FILE = "job.json"
UNFINISHED = "not finished"
MAX_NAME = 200
"""Characters of a folder's name; file systems allow 255 bytes."""
MEASURED = (
    "success_rate", "mean_reward", "mmer", "horizon", "total_timesteps", "total_updates", "steps_per_second",
    "total_seconds", "peak_rss_mb",
)  # fmt: skip
"""Entries of a run's summary that its row holds."""
NAMED = ("env", "env.id", "backbone", "train.seed")
"""Overrides that have columns of their own: task, backbone, seed."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A run of a sweep: its overrides, its configuration, and its error if it has one."""

    overrides: dict[str, str]
    config: dict[str, Any]
    error: str = UNFINISHED
    """Why the run has no result, in one line; empty for a finished run."""
    measured: dict[str, Any] = field(default_factory=dict)
    """The entries `MEASURED` of a finished run's summary."""
    later_error: str = ""
    """Why a later attempt failed, in one line. The result of the finished run is kept."""

    @property
    def task(self) -> str:
        """The environment's name, with its id where it has one."""
        env = self.config["env"]
        return env["name"] if env.get("id") is None else f"{env['name']}:{env['id']}"

    def write(self, folder: Path) -> None:
        """Write the job to its run's folder. Other processes may read it at the same time."""
        folder.mkdir(exist_ok=True)
        scratch = folder / f"{JOB_FILE}.tmp"
        scratch.write_text(json.dumps(asdict(self), indent=2, default=str) + "\n")
        scratch.replace(folder / JOB_FILE)


def read_jobs(files: Iterable[Path]) -> dict[Path, Job]:
    """Return the jobs in the given `JOB_FILE` files, by the folders of their runs."""
    return {file.parent: Job(**json.loads(file.read_text())) for file in sorted(files)}


def finished_job(folder: Path) -> Job | None:
    """Return the job of a run's folder if it is finished and its result is known; None otherwise."""
    job = read_jobs(folder.glob(JOB_FILE)).get(folder)
    if job is None or job.error:
        return None
    if job.measured:
        return job
    try:  # older versions left the result to the summary
        return replace(job, measured=measured_of(json.loads((folder / "summary.json").read_text())))
    except (OSError, ValueError):
        return None


def measured_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a summary that a row holds."""
    return {name: summary.get(name) for name in MEASURED}


def folder_name(overrides: Mapping[str, str]) -> str:
    """Return the name of a run's folder: its overrides, in an order that does not depend on the command line.

    The name has no "=" and no comma, so that `resume=FOLDER` needs no quotes.
    """
    parts = [f"{key}-{overrides[key]}" for key in sorted(overrides, key=_position)]
    name = re.sub(r"[^\w.-]+", "_", "__".join(parts)) or "default"
    if len(name) <= MAX_NAME:
        return name
    return f"{name[:MAX_NAME]}__{zlib.crc32(name.encode()):08x}"


def _position(key: str) -> tuple[bool, bool, str]:
    """Groups such as backbone come first, and the seed last."""
    return key == "train.seed", "." in key, key


def read_rows(sweep: Path) -> list[Row]:
    """Return a row for each run in a sweep's folder."""
    rows: list[Row] = []
    for folder, job in read_jobs(sweep.glob(f"*/{JOB_FILE}")).items():
        measured = {} if job.error else job.measured or json.loads((folder / "summary.json").read_text())
        row: Row = {"run": folder.name, "task": job.task, "backbone": job.config["backbone"]["name"]}
        row |= {key: value for key, value in job.overrides.items() if key not in NAMED}
        row |= {"seed": job.config["train"]["seed"], "target": target_of(job.config["env"])}
        row |= {name: measured.get(name) for name in MEASURED}
        rows.append(row | {"error": job.error})
    return rows


def override_keys(rows: Iterable[Row]) -> list[str]:
    """Return the columns of rows that are overrides, in the order of their first appearance."""
    fixed = ("run", "task", "backbone", "seed", "target", *MEASURED, "error")
    return list(dict.fromkeys(key for row in rows for key in row if key not in fixed))


def write_rows(sweep: Path) -> list[Row]:
    """Write results.csv of a sweep's folder, and return its rows. Several processes may do it at once."""
    rows = read_rows(sweep)
    columns = ("run", "task", "backbone", *override_keys(rows), "seed", "target", *MEASURED, "error")
    scratch = sweep / f"results.csv.{os.getpid()}"
    with scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    scratch.replace(sweep / "results.csv")
    return rows


def target_of(env: Mapping[str, Any]) -> float | None:
    """Return the success from which a task counts as solved, by its configuration; None if the task has no target."""
    try:
        task: Any = environments.get(env["name"])
        levels = getattr(task, "levels", None)
        if levels is None:
            return None
        return (levels[env["level"]] if env.get("level") else task.default).target
    except (UnknownNameError, ConfigError, KeyError):
        return None
