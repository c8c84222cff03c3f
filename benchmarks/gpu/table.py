"""Markdown tables of the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu.targets import lines, milliseconds
from benchmarks.gpu.timing import Row

VERDICTS = {True: "met", False: "**missed**", None: "not measured"}


def markdown(results: dict[str, Any]) -> str:
    """Return the tables of a run, for `docs/benchmarks.md`."""
    parts: dict[str, list[Row]] = {name: part["rows"] for name, part in results["parts"].items()}
    sections = [
        _about(results),
        _table(
            ("what", "ours", "compared with", "result", "target", ""),
            [(x.what, x.ours, x.other, x.result, x.target, VERDICTS[x.is_met]) for x in lines(parts)],
        ),
        _sequences([row for name in ("sequences", "large", "cores") for row in parts.get(name, [])]),
        _runs([row for name in ("default_runs", "many_environments", "mission") for row in parts.get(name, [])]),
        _minibatches(parts.get("minibatch", [])),
        _kernels(parts.get("kernels", [])),
        "\n".join(_notes(results["parts"])),
    ]
    return "\n\n".join(section for section in sections if section)


def _about(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    place = f"{machine['gpu'] or 'no GPU'}: Python {machine['python']}, {versions}."
    tests = next((row for row in results["parts"].get("tests", {"rows": []})["rows"] if "passed" in row), None)
    numbers = (
        f" Tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped." if tests else ""
    )
    if results["is_smoke"]:
        place = f"Tiny sizes, which test the command and measure nothing. {place}"
    return f"{place} Recorded on {results['recorded']}, commit {results['commit']}.{numbers}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; an empty text without rows."""
    if not rows:
        return ""
    head = [" | ".join(columns), "|".join(["---"] * len(columns))]
    return "\n".join([f"| {head[0]} |", f"|{head[1]}|", *(f"| {' | '.join(row)} |" for row in rows)])


def _by_mode(rows: list[Row], keys: Sequence[str]) -> Iterator[tuple[Row, str, str]]:
    """Yield each computation with its time without and in a graph."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "mode" in row:
            groups.setdefault(str([row[key] for key in keys]), {})[row["mode"]] = row
    for group in groups.values():
        eager, graph = (group.get(mode, {}) for mode in ("eager", "graph"))
        yield next(iter(group.values())), _time(eager), _time(graph)


def _time(row: Row) -> str:
    return milliseconds(row["ms"]) if "ms" in row else ""


def _sequences(rows: list[Row]) -> str:
    cells = [
        (_size(row["shape"]), f"{row['resets']:.0%}", row["subject"], eager, graph)
        for row, eager, graph in _by_mode(rows, ("shape", "resets", "subject"))
    ]
    return _table(("rows x steps x inputs, width", "resets", "forward and backward of", "eager", "in a graph"), cells)


def _size(shape: Sequence[int]) -> str:
    rows, steps, features, width = shape
    return f"{rows:,} x {steps} x {features}, {width}"


def _runs(rows: list[Row]) -> str:
    cells = [
        (
            row["run"],
            f"{row['steps']:,}",
            f"{row['steps_per_second']:,.0f}",
            _optional(row["steps_per_second_after_first_update"], ",.0f"),
            _optional(row["success"], ".3f"),
            f"{row['ratio_error']:.1e}",
        )
        for row in rows
        if "error" not in row
    ]
    columns = ("run", "steps", "steps/s with start-up", "after the first update", "success", "ratio error")
    return _table(columns, cells)


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _minibatches(rows: list[Row]) -> str:
    cells: list[tuple[str, ...]] = []
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        of_core = [row for row in rows if row["backbone"] == backbone]
        without: Row = next((row for row in of_core if "waits" in row), {})
        times = {row["subject"]: row for row in of_core if "subject" in row}
        waits = ", ".join(without["waits"]) or "none" if without else ""
        eager, graph = (times.get(name, {}) for name in ("optimiser step", "optimiser step in a graph"))
        launches = [_optional(row.get("launches"), "d") for row in (without, graph)]
        cells.append((backbone, launches[0], waits, _time(eager), launches[1], _time(graph)))
    columns = ("optimiser step of", "launches", "waits for the GPU", "eager", "launches with a graph", "with a graph")
    return _table(columns, cells)


def _kernels(rows: list[Row]) -> str:
    ceilings = ", ".join(f"{row['ceiling']} {row['value']:,.0f} {row['unit']}" for row in rows if "ceiling" in row)
    cells = [
        (" x ".join(f"{size:,}" for size in row["sizes"]), row["subject"], eager, graph)
        for row, eager, graph in _by_mode(rows, ("sizes", "subject"))
    ]
    table = _table(("steps x rows x width", "kernel, forward and backward", "eager", "in a graph"), cells)
    return "\n\n".join(text for text in (f"Ceilings: {ceilings}." if ceilings else "", table) if text)


def _notes(parts: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each failure, and for all computations of a part that were left out for one reason."""
    left_out: dict[tuple[str, str, str], list[str]] = {}
    for name, part in parts.items():
        if "error" in part:
            yield f"- {name} failed: {part['error']}"
        for row in part["rows"]:
            subject = " ".join(row[key] for key in ("backbone", "subject", "run", "test") if key in row)
            if "error" in row:
                yield f"- {name}, {subject}, failed: {row['error']}"
            if row.get("is_graph_refused"):
                yield f"- {name}, {subject}: the optimiser step could not be captured"
            if "left_out" in row:
                left_out.setdefault((name, row.get("mode", ""), row["left_out"]), []).append(subject)
    for (name, mode, reason), subjects in left_out.items():
        yield f"- {name}, {mode}, left out ({reason}): {', '.join(dict.fromkeys(subjects))}".replace(", ,", ",")
