"""The targets of the package on a GPU, and how a run's results compare with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.timing import Row

OLD_RESULTS = Path(__file__).parents[1] / "results" / "gpu.json"
"""Earlier measurements, from before the kernels."""
OLD_MAMBA = "mamba block, d_model 128"
SHORT_SEQUENCES = {"lru": ("GRU", 10.0), "gru": ("GRU", 2.0), "lstm": ("LSTM", 2.0)}
"""For each core, the cuDNN network that it is compared with, and how many times as fast it should be."""
MAMBA, LARGE_TORCHRL, LARGE_CUDNN, EVERY_CORE = 2.0, 1.5, 20.0, 1.0
LARGE_RESETS = 0.01
DEFAULT_SPEED, MANY_SPEED, MISSION_SPEED = 100_000.0, 1_500_000.0, 40_000.0
SUCCESS, RATIO_ERROR = 1.0, 1e-5
CHECKS = ("T = 1 and T = n", "two runs", "with and without graphs", "resumed run")


class Line(NamedTuple):
    """A target and its result."""

    what: str
    target: str
    result: str = ""
    is_met: bool | None = None
    """None: not measured."""
    ours: str = ""
    other: str = ""


def lines(parts: dict[str, list[Row]]) -> Iterator[Line]:
    """Yield every target. A result needs the rows of its part.

    Args:
        parts: rows by part.
    """
    yield from _short_sequences(parts.get("sequences", []))
    yield from _large_sequences(parts.get("large", []))
    yield from _every_core(parts.get("cores", []))
    for part, name, speed in (
        ("default_runs", "default run, lru", DEFAULT_SPEED),
        ("many_environments", "8,192 environments, lru of width 128", MANY_SPEED),
        ("mission", "command of the suite, mamba_gru", MISSION_SPEED),
    ):
        # The run with the target is the first one of its part.
        yield from _run(name, next(iter(parts.get(part, [])), {}), speed, part)
    yield from _exact([row for row in parts.get("exact", []) if "is_equal" in row])


def fastest(rows: Iterable[Row], pattern: str, resets: float, mode: str = "*") -> Row | None:
    """Return the fastest measurement of the subjects and modes that match the patterns; None if there is none."""
    found = [
        row
        for row in rows
        if "ms" in row
        and row["resets"] == resets
        and fnmatchcase(row["subject"], pattern)
        and fnmatchcase(row["mode"], mode)
    ]
    return min(found, key=lambda row: row["ms"], default=None)


def milliseconds(value: float) -> str:
    """Return a time as text."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _short_sequences(rows: list[Row]) -> Iterator[Line]:
    for core, (network, factor) in SHORT_SEQUENCES.items():
        ours, other = fastest(rows, core, 0.0, "graph"), fastest(rows, f"cuDNN {network}*", 0.0)
        yield _ratio(f"{core}, in a graph", ours, f"cuDNN {network}", other, factor)
    old = json.loads(OLD_RESULTS.read_text())["sequences"]["rows"]
    before = next(row["ms"] for row in old if row["ours"].startswith(OLD_MAMBA))
    name = "before our kernels, with mamba-ssm's"
    other = {"subject": name, "mode": "eager", "ms": before}
    yield _ratio("mamba block, in a graph", fastest(rows, "mamba block", 0.0, "graph"), name, other, MAMBA)


def _large_sequences(rows: list[Row]) -> Iterator[Line]:
    ours = fastest(rows, "gru", LARGE_RESETS)
    for name, factor in (("TorchRL GRU", LARGE_TORCHRL), ("cuDNN GRU", LARGE_CUDNN)):
        yield _ratio(f"gru, {LARGE_RESETS:.0%} resets", ours, name, fastest(rows, f"{name}*", LARGE_RESETS), factor)


def _every_core(rows: list[Row]) -> Iterator[Line]:
    name = "cuDNN GRU"
    other = fastest(rows, f"{name}*", 0.0)
    cores = dict.fromkeys(row["subject"] for row in rows if not row["subject"].startswith("cuDNN"))
    for core in cores or ["every core"]:
        yield _ratio(core, fastest(rows, core, 0.0), name, other, EVERY_CORE)


def _exact(rows: list[Row]) -> Iterator[Line]:
    for check in CHECKS:
        of_check = [row for row in rows if row["check"] == check]
        for row in of_check:
            result = "equal" if row["is_equal"] else f"differ by up to {row['largest_difference']:.1e}"
            yield Line(f"{check}, {row['subject']}", "equal bit by bit", result, row["is_equal"])
        if not of_check:
            yield Line(check, "equal bit by bit")


def _ratio(what: str, ours: Row | None, name: str, other: Row | None, factor: float) -> Line:
    """Compare speeds: the time of the other, by this name, divided by ours."""
    if ours is None or other is None:
        return Line(what, f">= {factor:g}", other=name)
    rows, steps, _, width = ours["shape"]
    ratio = other["ms"] / ours["ms"]
    return Line(
        f"{what}: {rows:,} x {steps}, width {width}",
        f">= {factor:g}",
        f"{ratio:.2f}",
        ratio >= factor,
        f"{milliseconds(ours['ms'])} ({ours['mode']})",
        f"{other['subject']}: {milliseconds(other['ms'])} ({other['mode']})",
    )


def _run(name: str, row: Row, speed: float, part: str) -> Iterator[Line]:
    for key, title in (
        ("steps_per_second", "steps/s with start-up"),
        ("steps_per_second_after_first_update", "steps/s after the first update"),
    ):
        value = row.get(key)
        result = "" if value is None else f"{value:,.0f}"
        yield Line(f"{name}: {title}", f">= {speed:,.0f}", result, None if value is None else value >= speed)
    if part in ("default_runs", "mission"):
        value = row.get("success")
        result = "" if value is None else f"{value:.3f} ({row['eval_episodes']} episodes)"
        yield Line(f"{name}: success", f"{SUCCESS}", result, None if value is None else value >= SUCCESS)
    if part == "default_runs":
        value = row.get("ratio_error")
        result = "" if value is None else f"{value:.1e}"
        yield Line(
            f"{name}: ratio error", f"<= {RATIO_ERROR:.0e}", result, None if value is None else value <= RATIO_ERROR
        )
