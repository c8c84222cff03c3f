r"""Runs tasks x backbones x levels or horizons x seeds, each in a process of its own, and prints one table.

python -m cyborg_torchrl.memory_benchmarks.sweep \
    --tasks delayed_cue n_back --backbones lru gru --levels easy --seeds 3 --jobs 2 --output results.csv
python -m cyborg_torchrl.memory_benchmarks.sweep \
    --config public_benchmark --tasks popgym:popgym-RepeatFirstEasy-v0 bsuite:memory_len/10 --seeds 3

Finished cells are written to the output at once, and skipped when the sweep is started again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cyborg_torchrl.build import build_env
from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.memory_benchmarks.arguments import positive, task_overrides, writable
from cyborg_torchrl.registry import environments

SUITE = "cyborg_torchrl.memory_benchmarks.pseudo_mamba_memory_suite"
DEFAULT_CONFIG = "memory_delayed_cue_recurrent"
ASKED: tuple[str, ...] = ("task", "backbone", "level", "horizon", "seed", "total_timesteps", "config", "overrides")
MEASURED: tuple[str, ...] = (
    "success_rate", "mean_reward", "episode_horizon", "env_steps", "total_updates", "steps_per_second",
    "total_seconds", "peak_rss_mb", "error",
)  # fmt: skip
OWN_OPTIONS = {
    "train.seed": "--seeds", "env": "--tasks", "env.id": "--tasks TASK:ID", "id": "--tasks TASK:ID",
    "backbone": "--backbones", "env.level": "--levels", "env.horizon": "--horizons",
    "train.total_timesteps": "--total-timesteps", "logger.base_dir": "--base-dir",
}  # fmt: skip
"""What a table would be wrong about if it were changed behind its back."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep; what is None is the task's own."""

    task: str
    """Name of an environment, with its id after a colon where it has ids."""
    backbone: str
    horizon: int | None
    seed: int
    total_timesteps: int | None = None
    overrides: str = ""
    level: str | None = None
    config: str = DEFAULT_CONFIG

    @property
    def folder(self) -> str:
        """Name of the folder that holds its run."""
        parts = [self.task, self.backbone, *([self.level] if self.level else [])]
        parts += [f"h{self.horizon}"] if self.horizon is not None else []
        parts += [f"t{self.total_timesteps}"] if self.total_timesteps is not None else []
        name = "-".join([*parts, f"s{self.seed}"]) + (f" {self.overrides}" if self.overrides else "")
        return re.sub(r"[^\w.-]+", "_", name if self.config == DEFAULT_CONFIG else f"{Path(self.config).stem}-{name}")

    def changes(self) -> list[str]:
        """What it changes in its configuration."""
        given = {"env.level": self.level, "env.horizon": self.horizon, "train.total_timesteps": self.total_timesteps}
        chosen = [f"{key}={value}" for key, value in given.items() if value is not None]
        return [*task_overrides(self.task), f"backbone={self.backbone}", *chosen, *shlex.split(self.overrides)]

    def command(self, base_dir: str) -> list[str]:
        """The suite's command line."""
        fixed = ["logger=quiet", f"train.seed={self.seed}", f"logger.base_dir={base_dir}/{self.folder}"]
        return [sys.executable, "-m", SUITE, "--config", self.config, *fixed, *self.changes()]


def run_cell(cell: Cell, base_dir: str) -> dict[str, Any]:
    """Runs a cell. Returns its row of the table; a failure is a row with its error."""
    result = subprocess.run(cell.command(base_dir), capture_output=True, text=True, check=False)
    lines = result.stdout.strip().splitlines()
    if result.returncode or not lines:
        return failed_row(cell, (result.stderr.strip().splitlines() or ["no output"])[-1])
    return finished_row(cell, json.loads(lines[-1]))


def finished_row(cell: Cell, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a run that has ended, from its summary."""
    named = {**summary, "episode_horizon": summary["horizon"], "env_steps": summary["total_timesteps"], "error": ""}
    return _asked(cell) | {name: named.get(name) for name in MEASURED}


def failed_row(cell: Cell, error: str) -> dict[str, Any]:
    """The row of a run that has not."""
    return _asked(cell) | {"error": error}


def _asked(cell: Cell) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in ASKED}


def read_rows(path: Path) -> dict[Cell, dict[str, Any]]:
    """Reads the finished cells of an output file; none if there is no file. Failed cells are run again.

    Raises:
        ValueError: if the file is no sweep's.
    """
    if not path.exists() or not path.stat().st_size:
        return {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != (*ASKED, *MEASURED):
            raise ValueError(f"'{path}' was not written by this sweep: give another --output, or remove it.")
        rows = [row for row in reader if not row["error"]]
    return {cell_of(row): row for row in rows}


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell of a row of a sweep's table."""
    numbers = {name: int(row[name]) if row[name] not in ("", None) else None for name in ("horizon", "total_timesteps")}
    return Cell(
        row["task"], row["backbone"], numbers["horizon"], int(row["seed"]), numbers["total_timesteps"],
        row["overrides"], row["level"] or None, row["config"],
    )  # fmt: skip


def target_of(cell: Cell) -> float | None:
    """The success that counts as solved, as the task has it; None where it has none."""
    task: Any = environments.get(cell.task.partition(":")[0])
    levels = getattr(task, "levels", None)
    return None if levels is None else (levels[cell.level] if cell.level else task.default).target


HEADERS = ("task", "backbone", "level", "horizon", "steps", "options", "target", "solved", "mean", "min", "seeds",
           "s/run", "MiB")  # fmt: skip


def lines_of(rows: Iterable[dict[str, Any]], target: float | None) -> list[tuple[str, ...]]:
    """A line under `HEADERS` for each group of runs that differ in nothing but the seed."""
    groups: dict[Cell, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[replace(cell_of(row), seed=0)].append(row)
    result: list[tuple[str, ...]] = []
    for cell, runs in sorted(groups.items(), key=lambda item: (item[0].task, item[0].backbone, str(item[0]))):
        runs = sorted(runs, key=lambda row: int(row["seed"]))
        done = [row for row in runs if not row["error"]]
        scores = [_score(row) for row in done]
        bar = target_of(cell) if target is None else target
        solved = "-" if bar is None else f"{sum(score >= bar for score in scores)}/{len(runs)}"
        horizon = done[0]["episode_horizon"] if done else cell.horizon
        steps = done[0]["env_steps"] if done else cell.total_timesteps
        result.append((
            cell.task, cell.backbone, cell.level or "", f"{int(horizon):,}" if horizon else "",
            f"{int(steps):,}" if steps else "", cell.overrides, "-" if bar is None else f"{bar:g}", solved,
            f"{mean(scores):.3f}" if scores else "-", f"{min(scores):.3f}" if scores else "-",
            " ".join("failed" if row["error"] else f"{_score(row):.2f}" for row in runs),
            f"{mean(float(row['total_seconds']) for row in done):.0f}" if done else "-",
            f"{max(float(row['peak_rss_mb']) for row in done):.0f}" if done else "-",
        ))  # fmt: skip
    return result


def _score(row: dict[str, Any]) -> float:
    """Success; the return of an environment that knows none."""
    known = row["mean_reward"] if row["success_rate"] in ("", None) else row["success_rate"]
    return float("nan") if known in ("", None) else float(known)


def table(rows: Iterable[dict[str, Any]], target: float | None = None) -> Table:
    """One line for each group of runs that differ in nothing but the seed."""
    result = Table(
        title="success on fresh episodes (greedy by default), or the mean return where a task knows no success"
    )
    for column in HEADERS:
        is_text = column in ("task", "backbone", "level", "options", "seeds")
        result.add_column(column, justify="left" if is_text else "right")
    for line in lines_of(rows, target):
        result.add_row(*line)
    return result


def markdown(rows: Iterable[dict[str, Any]], target: float | None = None) -> str:
    """The same as a Markdown table."""
    lines = [HEADERS, tuple("---" for _ in HEADERS), *lines_of(rows, target)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def build_parser() -> argparse.ArgumentParser:
    """The sweep's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="shipped configuration, or a file (%(default)s)")
    parser.add_argument("--tasks", nargs="+", default=["delayed_cue"], metavar="TASK",
                        help="environments (%(default)s); of other packages with the id: popgym:ID")  # fmt: skip
    parser.add_argument("--backbones", nargs="+", default=["lru"], help="memories (%(default)s)")
    parser.add_argument("--levels", nargs="+", default=[None], metavar="LEVEL",
                        help="easy, medium, hard, extreme (the task's own default)")  # fmt: skip
    parser.add_argument("--horizons", nargs="+", type=int, default=[None], metavar="STEPS",
                        help="blank steps between cue and query (the task's own)")  # fmt: skip
    parser.add_argument("--seeds", type=positive, default=3, help="seeds 0 to N-1 (%(default)s)")
    parser.add_argument("--total-timesteps", type=positive, help="budget of a run (the task's own)")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at the same time (%(default)s)")
    parser.add_argument("--target", type=float, help="success, or return, that counts as solved (the task's own)")
    parser.add_argument("--base-dir", default="runs/sweep", help="folder of the runs (%(default)s)")
    parser.add_argument("--output", type=Path, help="a row a run; runs in it are not run again (BASE_DIR/results.csv)")
    parser.add_argument("--markdown", type=writable, help="file to write the table to, as Markdown")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration of every run")
    return parser


def run_cells(cells: Sequence[Cell], base_dir: str, output: Path, jobs: int) -> list[dict[str, Any]]:
    """Runs the cells that the output file does not hold yet, and writes each to it as it ends.

    Returns:
        A row for each cell, those of the file first.

    Raises:
        KeyboardInterrupt: when interrupted; what has ended by then is in the file.
        OSError: if the file cannot be written.
        ValueError: if the file is no sweep's.
    """
    finished = read_rows(output)
    console = Console(stderr=True)
    rows = [finished[cell] for cell in cells if cell in finished]
    if rows:
        console.print(f"{len(rows)} of {len(cells)} runs are taken from {output}; remove it to run them again")
    output.parent.mkdir(parents=True, exist_ok=True)
    is_new = not output.exists() or not output.stat().st_size
    pool = ThreadPoolExecutor(max(1, jobs))
    with output.open("a", newline="") as file, Progress(console=console) as progress:
        writer = csv.DictWriter(file, (*ASKED, *MEASURED), restval="")
        if is_new:
            writer.writeheader()
        task = progress.add_task("runs", total=len(cells), completed=len(rows))
        futures = [pool.submit(run_cell, cell, base_dir) for cell in cells if cell not in finished]
        try:
            for future in as_completed(futures):
                row = future.result()
                writer.writerow(row)
                file.flush()
                rows.append(row)
                progress.advance(task)
                known = row["success_rate"] if not row["error"] else None
                figure = row["error"] or (f"success {known}" if known is not None else f"return {row['mean_reward']}")
                progress.console.print(f"{cell_of(row).folder}: {figure}")
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            console.print(f"interrupted: {len(rows)} of {len(cells)} runs are in {output}")
            raise
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweep. Returns 0, 1 if a run failed, 2 for a configuration that cannot be, 130 if interrupted."""
    parser = build_parser()
    arguments = parser.parse_intermixed_args(argv)
    output: Path = arguments.output or Path(arguments.base_dir) / "results.csv"
    grid = itertools.product(
        arguments.tasks, arguments.backbones, arguments.levels, arguments.horizons, range(arguments.seeds)
    )
    overrides = shlex.join(arguments.overrides)
    cells = list(dict.fromkeys(
        Cell(task, backbone, horizon, seed, arguments.total_timesteps, overrides, level, arguments.config)
        for task, backbone, level, horizon, seed in grid
    ))  # fmt: skip
    for override in arguments.overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key in OWN_OPTIONS:
            parser.error(f"'{override}' is the sweep's own to say: use {OWN_OPTIONS[key]}")
    try:  # what is wrong for all runs is said once, and at once
        for cell in cells:
            if cell.seed == 0:
                build_env(load_config(cell.config, cell.changes()), num_envs=1).close()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        rows = run_cells(cells, arguments.base_dir, output, arguments.jobs)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:  # of the output file: runs report theirs in the table
        named = "--output" if arguments.output else "--base-dir"
        print(f"error: {named}: {error}", file=sys.stderr)
        return 2
    Console(width=200).print(table(rows, arguments.target))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, arguments.target))
    return 1 if any(row["error"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
