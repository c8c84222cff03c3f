"""Draw learning curves from the metrics of runs, one line for each group of runs.

python -m benchmarks.plot --output curve.png lru=runs/lru-* control=runs/none-*
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

EXTRA = "plots need matplotlib: pip install 'cyborg-torchrl[report]'"


def read_curve(run: Path, column: str) -> tuple[list[float], list[float]]:
    """Return the steps and the values of a column of a run's metrics.csv."""
    with (run / "logs" / "metrics.csv").open(newline="") as file:
        rows = [(float(row["steps"]), float(row[column])) for row in csv.DictReader(file) if row[column]]
    return [steps for steps, _ in rows], [value for _, value in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the curves. Return 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="label=run", help="run folders, each with the label of its group")
    parser.add_argument("--column", default="success_rate", help="column of metrics.csv (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="picture to write (.png, .svg)")
    parser.add_argument("--title", default="", help="title of the picture")
    parser.add_argument("--chance", type=float, help="draw a line at chance level")
    arguments = parser.parse_args(argv)
    try:
        from matplotlib import pyplot
    except ImportError:
        print(f"error: {EXTRA}", file=sys.stderr)
        return 2
    groups: dict[str, list[Path]] = {}
    for item in arguments.runs:
        label, _, run = item.rpartition("=")
        if not (Path(run) / "logs" / "metrics.csv").is_file():
            print(f"error: no logs/metrics.csv in '{run}'", file=sys.stderr)
            return 2
        groups.setdefault(label or Path(run).name, []).append(Path(run))
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for index, (label, runs) in enumerate(groups.items()):
        for number, run in enumerate(runs):
            steps, values = read_curve(run, arguments.column)
            name = f"{label} ({len(runs)} seed{'s' * (len(runs) > 1)})" if number == 0 else None
            axes.plot(steps, values, color=f"C{index}", alpha=0.75, marker="o", markersize=3, label=name)
    if arguments.chance is not None:
        axes.axhline(arguments.chance, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="environment steps", ylabel=arguments.column.replace("_", " "), title=arguments.title)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
    if arguments.column == "success_rate":
        axes.set_ylim(0, 1.03)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.output, dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
