"""What was run: each folder with its state and what sets it apart, the versions and machines behind it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from cyborg_torchrl.memory_benchmarks.report.charts import Anchor, Row, Table
from cyborg_torchrl.memory_benchmarks.report.groups import Group, differences, flatten
from cyborg_torchrl.memory_benchmarks.report.runs import Run


def run_anchor(index: int) -> str:
    """Name of a run's row."""
    return f"run-{index + 1}"


def group_anchor(index: int) -> str:
    """Name of the first row of a group's runs."""
    return f"group-{index + 1}"


def setups(runs: Sequence[Run]) -> dict[str, str]:
    """Letters of the different versions and machines that runs had, by what they are; those that are known."""
    letters: dict[str, str] = {}
    for run in runs:
        if run.manifest:
            letters.setdefault(_setup(run), _letter(len(letters)))
    return letters


def runs_table(runs: Sequence[Run], groups: Sequence[Group]) -> Table:
    """A row for each run, those of a group together; its anchor is that of its place among the runs."""
    letters = setups(runs)
    differing = differences([flatten(run.config) for run in runs])
    base = common_folder(runs)
    places = {id(run): index for index, run in enumerate(runs)}
    ordered = [(run, number) for number, group in enumerate(groups) for run in group.runs]
    grouped = {id(run) for run, _ in ordered}
    rows: list[Row] = []
    for run, number in [*ordered, *((run, None) for run in runs if id(run) not in grouped)]:
        index = places[id(run)]
        own = " ".join(f"{key}={value}" for key, value in differing[index].items())
        group = None if number is None else groups[number]
        backbone: str | Anchor = "?" if group is None else group.backbone
        if group is not None and number is not None and run is group.runs[0]:
            backbone = Anchor(group.backbone, group_anchor(number))
        rows.append((
            Anchor(str(index + 1), run_anchor(index)), run.status, group.place if group else "?", backbone,
            "-" if run.seed is None else str(run.seed), "-" if run.score is None else f"{run.score:.3f}",
            f"{run.steps:,}", letters.get(_setup(run), "-") if run.manifest else "-", own or "-", run.note or "-",
            _below(run.path, base),
        ))  # fmt: skip
    headers = ("run", "state", "task", "backbone", "seed", "score", "steps", "setup", "differs in", "note", "folder")
    return Table(headers, rows, is_wide=True)


def versions_table(runs: Sequence[Run]) -> Table:
    """A row for each setup: commit, versions, machine, how many runs."""
    rows: list[Row] = []
    for setup, letter in setups(runs).items():
        same = [run for run in runs if run.manifest and _setup(run) == setup]
        manifest = same[0].manifest
        versions, machine = manifest.get("versions") or {}, manifest.get("machine") or {}
        started = sorted(str(run.manifest.get("started", "?")) for run in same)
        rows.append((
            letter, str(len(same)), str(manifest.get("commit") or "-"),
            ", ".join(f"{name} {number}" for name, number in versions.items()) or "-",
            ", ".join(f"{name} {value}" for name, value in machine.items() if value) or "-",
            started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}",
        ))  # fmt: skip
    return Table(("setup", "runs", "commit", "versions", "machine", "started"), rows)


def common_folder(runs: Sequence[Run]) -> Path | None:
    """The folder that all runs are in; None where there is none, or but one run."""
    try:
        return Path(os.path.commonpath([run.path.absolute().parent for run in runs])) if len(runs) > 1 else None
    except ValueError:  # on several drives
        return None


def _below(path: Path, base: Path | None) -> str:
    return str(path if base is None else path.absolute().relative_to(base))


def _setup(run: Run) -> str:
    return json.dumps([run.manifest.get(key) for key in ("commit", "versions", "machine")], sort_keys=True)


def _letter(index: int) -> str:
    return chr(ord("A") + index % 26) * (1 + index // 26)
