"""Runs that a sweep has a row for and that failed: their folders say less, or were never made."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.memory_benchmarks.report.runs import Run
from cyborg_torchrl.memory_benchmarks.sweep import ASKED, MEASURED, Cell, cell_of


def failures(path: Path) -> dict[Path, tuple[Cell, str]]:
    """Folders of the cells that failed and did not end well later, with the cell and the last line of its error.

    Args:
        path: a sweep's folder; one without a sweep's results.csv has no failures.
    """
    found: dict[Path, tuple[Cell, str]] = {}
    for file in sorted(path.rglob("results.csv")):
        with file.open(newline="", errors="replace") as lines:
            reader = csv.DictReader(lines)
            rows = list(reader) if tuple(reader.fieldnames or ()) == (*ASKED, *MEASURED) else []
        for row in rows:
            cell = cell_of(row)
            folder = file.parent / cell.folder
            if row["error"]:
                found[folder] = (cell, row["error"])
            else:
                found.pop(folder, None)
    return found


def with_failures(runs: list[Run], paths: Iterable[Path]) -> list[Run]:
    """Says of the runs of failed cells what the sweep knows; a cell without a run becomes a run of status "failed"."""
    result = list(runs)
    for path in paths:
        for folder, (cell, error) in failures(path).items():
            note = f"Failed: {error}"
            inside = [index for index, run in enumerate(result) if folder in run.path.parents]
            for index in inside:
                if result[index].status in ("unfinished", "broken"):
                    result[index] = replace(result[index], status="failed", note=note)
            if not inside and not any(run.path == folder for run in result):
                result.append(Run(folder, "failed", note, _config_of(cell)))
    return result


def _config_of(cell: Cell) -> dict[str, Any]:
    """The configuration that a cell asks for; the little that its row says where that cannot be composed."""
    try:
        config: Any = OmegaConf.to_container(load_config(cell.config, [*cell.changes(), f"train.seed={cell.seed}"]))
    except ConfigError:
        env = {"name": cell.task, "horizon": cell.horizon, "level": cell.level}
        return {"env": env, "backbone": {"name": cell.backbone}, "train": {"seed": cell.seed}}
    return config
