"""Runs of a sweep that failed: their folders hold less than those of other runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from cyborg_torchrl.memory_benchmarks.report.runs import Run
from cyborg_torchrl.memory_benchmarks.results import JOB_FILE, UNFINISHED, read_jobs


def with_failures(runs: list[Run], paths: Iterable[Path]) -> list[Run]:
    """Return the runs, where those that failed in a sweep have the status "failed" and a note with the error.

    Args:
        runs: the runs in the given folders, from `find_runs`.
        paths: folders; a job of a sweep that failed before its run began is added as a run.
    """
    result = list(runs)
    positions = {run.path.resolve(): index for index, run in enumerate(runs)}
    for path in paths:
        for folder, job in read_jobs(path.rglob(JOB_FILE)).items():
            if job.error in ("", UNFINISHED):
                continue
            note = f"Failed: {job.error}"
            index = positions.get(folder.resolve())
            if index is None:
                positions[folder.resolve()] = len(result)
                result.append(Run(folder, "failed", note, job.config))
            elif result[index].status in ("unfinished", "broken"):
                result[index] = replace(result[index], status="failed", note=note)
    return result
