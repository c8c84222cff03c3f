"""A table and a trace of where a run's time goes, from torch's profiler."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cyborg_torchrl.collectors.profiling import PREFIX

WARM_UP, MEASURED = 2, 2
"""Updates before the profiler starts, which allocate and compile, and updates that it records."""
MAX_BYTES = 50_000_000
"""Largest trace. In a larger one only the parts of the run are kept, without torch's operations."""
PARTS = {
    "collect": ("policy", "environment", "storage"),
    "advantages": (),
    "update": ("minibatches", "forward", "backward", "optimizer"),
}
"""The parts of an update, and what they consist of."""


@contextmanager
def profiled(folder: Path, updates: int) -> Generator[Callable[[], None]]:
    """Profile some updates of a run, and write `table.txt` and `trace.json.gz`.

    Yields a function to call after each update.

    Args:
        folder: where the files are written.
        updates: number of updates of the run. A short run has a shorter warm-up.
    """
    warm_up = max(0, min(WARM_UP, updates - MEASURED))
    measured = min(MEASURED, updates)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch prints lines about its profiler
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    profiler = profile(activities=activities)
    finished, is_on = 0, False

    def start() -> None:
        nonlocal is_on
        profiler.start()
        is_on = True

    def stop() -> None:
        nonlocal is_on
        profiler.stop()
        is_on = False
        _write(profiler, folder)

    def after_update() -> None:
        nonlocal finished
        finished += 1
        if finished == warm_up and not is_on:
            start()
        elif finished == warm_up + measured and is_on:
            stop()

    if not warm_up and measured:
        start()
    try:
        yield after_update
    finally:
        if is_on:  # an interrupted run
            stop()


def _write(profiler: profile, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    events = profiler.key_averages()
    operations = events.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50)
    (folder / "table.txt").write_text(f"{table(events)}\n\nOperations of torch:\n{operations}\n")
    trace = folder / "trace.json.gz"
    profiler.export_chrome_trace(str(trace))
    if trace.stat().st_size > MAX_BYTES:
        keep_parts(trace)


def table(events: Any) -> str:
    """Return the time of each part of a run as a table.

    Args:
        events: averages of a profiler.
    """
    found = {event.key.removeprefix(PREFIX): event for event in events if event.key.startswith(PREFIX)}
    seconds = {name: event.cpu_time_total / 1e6 for name, event in found.items()}
    total = sum(seconds.get(name, 0.0) for name in PARTS)
    updates = max(1, found["update"].count) if "update" in found else 1
    lines = [f"{'part':<16}{'s / update':>12}{'share':>8}{'calls / update':>16}"]
    for name, inner in PARTS.items():
        for part in (name, *inner):
            if part in found:
                label = part if part == name else f"  {part}"
                share, calls = seconds[part] / total, found[part].count / updates
                lines.append(f"{label:<16}{seconds[part] / updates:>12.4f}{share:>8.1%}{calls:>16,.0f}")
    return "\n".join(lines)


def keep_parts(trace: Path) -> None:
    """Remove everything but the parts of the run from a trace."""
    with gzip.open(trace, "rt") as file:
        content = json.load(file)
    content["traceEvents"] = [event for event in content["traceEvents"] if event.get("cat") == "user_annotation"]
    with gzip.open(trace, "wt") as file:
        json.dump(content, file)
