r"""Runs tasks x backbones x horizons x seeds, each in a process of its own, and prints one table.

python -m cyborg_torchrl.memory_benchmarks.sweep \
    --tasks delayed_cue --backbones lru gru --horizons 1000 --seeds 10 --jobs 2 --output results.csv

Finished cells are written to the output at once, and skipped when the sweep is started again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.memory_benchmarks.arguments import positive

SUITE = "cyborg_torchrl.memory_benchmarks.pseudo_mamba_memory_suite"
COLUMNS: tuple[str, ...] = (
    "task", "backbone", "horizon", "seed", "total_timesteps", "overrides", "success_rate", "mean_reward",
    "env_steps", "total_updates", "steps_per_second", "total_seconds", "peak_rss_mb", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    task: str
    backbone: str
    horizon: int
    seed: int
    total_timesteps: int
    overrides: str

    @property
    def folder(self) -> str:
        """Name of the folder that holds its run."""
        name = f"{self.task}-{self.backbone}-h{self.horizon}-t{self.total_timesteps}-s{self.seed}"
        return name + re.sub(r"[^\w.-]+", "_", f" {self.overrides}" if self.overrides else "")

    def command(self, base_dir: str) -> list[str]:
        """The suite's command line."""
        flags = {
            "task": self.task,
            "backbone": self.backbone,
            "horizon": self.horizon,
            "seed": self.seed,
            "total-timesteps": self.total_timesteps,
            "base-dir": f"{base_dir}/{self.folder}",
        }
        arguments = itertools.chain.from_iterable((f"--{flag}", str(value)) for flag, value in flags.items())
        return [sys.executable, "-m", SUITE, *arguments, "logger=quiet", *self.overrides.split()]


def run_cell(cell: Cell, base_dir: str) -> dict[str, Any]:
    """Runs a cell. Returns its row of the table; a failure is a row with its error."""
    row: dict[str, Any] = {name: getattr(cell, name) for name in Cell.__dataclass_fields__}
    result = subprocess.run(cell.command(base_dir), capture_output=True, text=True, check=False)
    lines = result.stdout.strip().splitlines()
    if result.returncode or not lines:
        return row | {"error": (result.stderr.strip().splitlines() or ["no output"])[-1]}
    summary = json.loads(lines[-1])
    figures = {name: summary.get(name) for name in COLUMNS if name in summary and name not in row}
    return row | figures | {"env_steps": summary["total_timesteps"], "error": ""}


def read_rows(path: Path) -> dict[Cell, dict[str, Any]]:
    """Reads the finished cells of an output file; none if there is no file. Failed cells are run again."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["error"]]
    return {
        Cell(r["task"], r["backbone"], int(r["horizon"]), int(r["seed"]), int(r["total_timesteps"]), r["overrides"]): r
        for r in rows
    }


def table(rows: Iterable[dict[str, Any]], target: float) -> Table:
    """One line for each task, backbone, horizon and budget."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        key = (row["task"], row["backbone"], int(row["horizon"]), int(row["total_timesteps"]), row["overrides"])
        groups[key].append(row)
    result = Table(title=f"greedy success on fresh episodes (solved: >= {target})")
    for column in (
        "task",
        "backbone",
        "horizon",
        "budget",
        "options",
        "solved",
        "mean",
        "min",
        "seeds",
        "s/run",
        "MiB",
    ):
        result.add_column(column, justify="left" if column in ("task", "backbone", "options", "seeds") else "right")
    for (task, backbone, horizon, budget, options), cells in sorted(groups.items()):
        cells = sorted(cells, key=lambda row: int(row["seed"]))
        scores = [
            float(row["success_rate"]) for row in cells if not row["error"] and row["success_rate"] not in ("", None)
        ]
        done = [row for row in cells if not row["error"]]
        result.add_row(
            task, backbone, f"{horizon:,}", f"{budget:,}", options,
            f"{sum(score >= target for score in scores)}/{len(cells)}",
            f"{mean(scores):.3f}" if scores else "-", f"{min(scores):.3f}" if scores else "-",
            " ".join(f"{score:.2f}" for score in scores),
            f"{mean(float(row['total_seconds']) for row in done):.0f}" if done else "-",
            f"{max(float(row['peak_rss_mb']) for row in done):.0f}" if done else "-",
        )  # fmt: skip
    return result


def build_parser() -> argparse.ArgumentParser:
    """The sweep's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["delayed_cue"], help="environments (%(default)s)")
    parser.add_argument("--backbones", nargs="+", default=["lru"], help="memories (%(default)s)")
    parser.add_argument("--horizons", nargs="+", type=int, default=[1000], help="blank steps (%(default)s)")
    parser.add_argument("--seeds", type=positive, default=3, help="seeds 0 to N-1 (%(default)s)")
    parser.add_argument("--total-timesteps", type=positive, default=200_000, help="budget of a run (%(default)s)")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at the same time (%(default)s)")
    parser.add_argument("--target", type=float, default=0.95, help="success that counts as solved (%(default)s)")
    parser.add_argument("--base-dir", default="runs/sweep", help="folder of the runs (%(default)s)")
    parser.add_argument("--output", type=Path, help="a row a run; runs in it are not run again (BASE_DIR/results.csv)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration of every run")
    return parser


def run_cells(cells: Sequence[Cell], base_dir: str, output: Path, jobs: int) -> list[dict[str, Any]]:
    """Runs the cells that the output file does not hold yet, and writes each to it as it ends.

    Returns:
        A row for each cell, those of the file first.

    Raises:
        KeyboardInterrupt: when interrupted; what has ended by then is in the file.
    """
    finished = read_rows(output)
    console = Console(stderr=True)
    rows = [finished[cell] for cell in cells if cell in finished]
    if rows:
        console.print(f"{len(rows)} of {len(cells)} runs are taken from {output}; remove it to run them again")
    output.parent.mkdir(parents=True, exist_ok=True)
    is_new = not output.exists()
    pool = ThreadPoolExecutor(max(1, jobs))
    with output.open("a", newline="") as file, Progress(console=console) as progress:
        writer = csv.DictWriter(file, COLUMNS, restval="")
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
                figure = row["error"] or f"success {row['success_rate']}"
                progress.console.print(
                    f"{row['task']} {row['backbone']} h{row['horizon']} seed {row['seed']}: {figure}"
                )
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            console.print(f"interrupted: {len(rows)} of {len(cells)} runs are in {output}")
            raise
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweep. Returns 0, 1 if a run failed, 2 for a configuration that cannot be, 130 if interrupted."""
    arguments = build_parser().parse_intermixed_args(argv)
    output: Path = arguments.output or Path(arguments.base_dir) / "results.csv"
    grid = itertools.product(arguments.tasks, arguments.backbones, arguments.horizons, range(arguments.seeds))
    overrides = " ".join(arguments.overrides)
    cells = [Cell(*choice, arguments.total_timesteps, overrides) for choice in grid]
    try:  # what is wrong for all runs is said once, and at once
        for task, backbone in itertools.product(arguments.tasks, arguments.backbones):
            load_config(overrides=[f"env={task}", f"backbone={backbone}", *arguments.overrides])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        rows = run_cells(cells, arguments.base_dir, output, arguments.jobs)
    except KeyboardInterrupt:
        return 130
    Console(width=200).print(table(rows, arguments.target))
    return 1 if any(row["error"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
