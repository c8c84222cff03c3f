"""Time subjects in turns, so that other load of the machine affects all of them equally."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.device import finish

Subject = tuple[str, Callable[[], int]]
"""A name, and a function that runs once and returns its environment steps."""


WARM_UP = 3
"""Turns that do not count: the process still requests memory from the system."""


class Timing(NamedTuple):
    """Timing of one run."""

    wall: float
    """Seconds."""
    cpu: float
    """CPU seconds of this process, over all threads."""
    steps: int


def time_once(run: Callable[[], int]) -> Timing:
    """Run a subject once, and time it."""
    finish()  # wait for earlier work
    wall, cpu = time.perf_counter(), time.process_time()
    steps = run()
    finish()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu, steps)


def take_turns(subjects: Sequence[Subject], repeats: int) -> dict[str, list[Timing]]:
    """Run all subjects in turns, after `WARM_UP` turns that do not count."""
    timings: dict[str, list[Timing]] = {name: [] for name, _ in subjects}
    for repeat in range(WARM_UP + repeats):
        for name, run in subjects:
            timing = time_once(run)
            if repeat >= WARM_UP:
                timings[name].append(timing)
    return timings


def rows_of(timings: dict[str, list[Timing]], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each subject: medians, and the median speed ratio of the first subject to it."""
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
