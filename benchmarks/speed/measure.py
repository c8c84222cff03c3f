"""Times subjects in turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.device import finish

Subject = tuple[str, Callable[[], int]]
"""A name, and what runs it once and returns the environment steps that it took."""


WARM_UP = 3
"""Turns before those that count: until then the process asks the system for memory, as it does once in a training."""


class Timing(NamedTuple):
    """One run."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds of this process, all threads together."""
    steps: int


def time_once(run: Callable[[], int]) -> Timing:
    """Runs and times it."""
    finish()  # what was queued before
    wall, cpu = time.perf_counter(), time.process_time()
    steps = run()
    finish()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu, steps)


def take_turns(subjects: Sequence[Subject], repeats: int) -> dict[str, list[Timing]]:
    """Runs all in turns, `WARM_UP` times more often than is counted."""
    timings: dict[str, list[Timing]] = {name: [] for name, _ in subjects}
    for repeat in range(WARM_UP + repeats):
        for name, run in subjects:
            timing = time_once(run)
            if repeat >= WARM_UP:
                timings[name].append(timing)
    return timings


def rows_of(timings: dict[str, list[Timing]], about: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each subject: medians, and how many times as fast as it the first subject is (by neighbours)."""
    first = next(iter(timings.values()))
    rows = []
    for name, runs in timings.items():
        pairs = list(zip(first, runs, strict=True))
        rows.append(
            {
                **about,
                "subject": name,
                "steps_per_second": median(run.steps / run.wall for run in runs),
                "wall_us_per_step": 1e6 * median(run.wall / run.steps for run in runs),
                "cpu_us_per_step": 1e6 * median(run.cpu / run.steps for run in runs),
                "first_is_times_as_fast": median((b.wall / b.steps) / (a.wall / a.steps) for a, b in pairs),
                "first_is_times_as_fast_by_cpu": median((b.cpu / b.steps) / (a.cpu / a.steps) for a, b in pairs),
                "repeats": len(runs),
            }
        )
    return rows
