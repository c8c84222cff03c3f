r"""Compare the recurrent modes on a delay that is longer than a chunk: success, state drift, time.

python -m benchmarks.modes --backbones lru gru --seeds 5 --jobs 2 --plot modes.png

The task is delayed cue with 94 blank steps, so an episode is three chunks of 32 steps, and the rewarded chunk
never holds the cue. The same command started again skips finished runs.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.plot import EXTRA
from cyborg_torchrl.memory_benchmarks.results import Row, read_rows
from cyborg_torchrl.training.command import EXIT_INTERRUPTED, picture, positive
from cyborg_torchrl.training.stats import mean_interval

CHUNK = "train=burn_in train.seq_len=32"
ARMS: dict[str, str] = {
    "no memory": "train=none",
    "zero": f"{CHUNK} train.start_state=initial",
    "zero + burn-in 32": f"{CHUNK} train.burn_in=32 train.start_state=initial",
    "zero + burn-in 64": f"{CHUNK} train.burn_in=64 train.start_state=initial",
    "stored (tbptt)": "train=tbptt train.seq_len=32",
    "stored + burn-in 32": f"{CHUNK} train.burn_in=32",
    "stored, refreshed": "train=tbptt train.seq_len=32 train.refresh_states=true",
    "stored, 1 step": "train=burn_in train.seq_len=1",
    "whole episodes": "train=episode",
}
FIGURES = ("success_rate", "training_success", "state_drift", "drift_kl_last", "ratio_error", "total_seconds")


def run_sweep(arguments: argparse.Namespace, arm: str) -> Path:
    """Sweep over backbones and seeds in one mode, with `cyborg-torchrl sweep`. Return the sweep's folder.

    Raises:
        KeyboardInterrupt: if the sweep was interrupted.
    """
    folder = Path(arguments.base_dir) / re.sub(r"\W+", "_", arm)
    recipe = ["env.horizon=94", "train.learning_rate=0.001", "logger.tensorboard=false", *ARMS[arm].split()]
    varied = [f"backbone={','.join(arguments.backbones)}", f"train.seed=range({arguments.seeds})"]
    budget = f"train.total_timesteps={arguments.total_timesteps}"
    command = [sys.executable, "-m", "cyborg_torchrl", "sweep", "--folder", str(folder), "--jobs", str(arguments.jobs)]
    if subprocess.run([*command, *varied, budget, *recipe], check=False).returncode == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    return folder


def read_figures(row: Row, folder: Path) -> dict[str, float]:
    """Read a run: its success and time, and the means of its log over all updates (ratio error: the first).

    The mean success while training, with sampled actions, is larger the sooner a run learns.
    """
    figures = {name: float(row[name]) for name in ("success_rate", "total_seconds")}
    with (folder / "logs" / "metrics.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    columns = {"state_drift": "state_drift", "drift_kl_last": "drift_kl_last", "training_success": "success_rate"}
    for name, column in columns.items():
        values = [float(update[column]) for update in log if update.get(column)]
        if values:
            figures[name] = mean(values)
    figures["ratio_error"] = float(log[0]["ratio_error"])
    return figures


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval: 0 for a single value, NaN for no value."""
    centre = mean(values) if values else float("nan")
    limits = mean_interval(torch.tensor(values, dtype=torch.float64))
    return centre, 0.0 if limits is None else (limits.high - limits.low) / 2


def table(results: dict[tuple[str, str], list[dict[str, float]]]) -> Table:
    """Return a table with one line for each backbone and mode."""
    lines = Table(
        "backbone", "start of a chunk", title="delayed cue, 94 blank steps, chunks of 32; mean and 95 % interval"
    )
    for name in ("success", "while training", "drift of the state", "KL at the last step", "ratio error", "s/run"):
        lines.add_column(name, justify="right")
    formats = ("{:.3f} ± {:.3f}", "{:.3f} ± {:.3f}", "{:.3f} ± {:.3f}", "{:.4f}", "{:.1e}", "{:.0f}")
    for (backbone, arm), runs in results.items():
        cells = [interval([run[name] for run in runs if name in run]) for name in FIGURES]
        lines.add_row(backbone, arm, *(text.format(*cell) for text, cell in zip(formats, cells, strict=True)))
    return lines


def draw(results: dict[tuple[str, str], list[dict[str, float]]], path: Path) -> None:
    """Draw success and drift of each mode, with a dot for each seed and intervals."""
    from matplotlib import pyplot

    backbones = list(dict.fromkeys(backbone for backbone, _ in results))
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.5), layout="constrained", sharey=True)
    arms = list(dict.fromkeys(arm for _, arm in results))
    for number, backbone in enumerate(backbones):
        for side, name in zip(axes, ("success_rate", "training_success", "state_drift"), strict=True):
            for line, arm in enumerate(arms):
                values = [run[name] for run in results.get((backbone, arm), []) if name in run]
                height = -line + 0.22 * (number - (len(backbones) - 1) / 2)
                if not values:
                    continue
                centre, half = interval(values)
                label = backbone if line == 0 else None
                side.errorbar(centre, height, xerr=half, fmt="o", color=f"C{number}", capsize=3, label=label)
                side.plot(values, [height] * len(values), "|", color=f"C{number}", alpha=0.5)
    for side in axes[:2]:
        side.axvline(0.25, color="grey", linestyle=":", label="chance")
        side.set(xlim=(0, 1.03))
    axes[0].set(xlabel="greedy success after training", yticks=[-i for i in range(len(arms))], yticklabels=arms)
    axes[1].set(xlabel="mean success while training")
    axes[2].set(xlabel="drift of the state, |used - fresh| / |fresh|", xlim=(0, None))
    axes[0].legend(frameon=False, loc="center")
    for side in axes:
        side.spines[["top", "right"]].set_visible(False)
        side.grid(axis="y", alpha=0.2)
    figure.savefig(path, dpi=150)


def build_parser() -> argparse.ArgumentParser:
    """Build the command's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["lru"], help="memories (%(default)s)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM",
                        help=f"modes, of: {', '.join(map(repr, ARMS))} (all)")  # fmt: skip
    parser.add_argument("--seeds", type=positive, default=5, help="seeds 0 to N-1 (%(default)s)")
    parser.add_argument("--total-timesteps", type=positive, default=80_000, help="budget of a run (%(default)s)")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at the same time (%(default)s)")
    parser.add_argument("--base-dir", default="runs/modes", help="folder of the runs (%(default)s)")
    parser.add_argument("--plot", type=picture, help="picture to write (.png, .svg)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison. Return 0, 1 if a run failed, 2 if the picture cannot be drawn, 130 if interrupted."""
    arguments = build_parser().parse_args(argv)
    if arguments.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            print(f"error: {EXTRA}", file=sys.stderr)
            return 2
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    has_failed = False
    for arm in arguments.arms:
        try:
            folder = run_sweep(arguments, arm)
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        rows = read_rows(folder)
        has_failed |= not rows or any(row["error"] for row in rows)
        for row in rows:
            if not row["error"]:
                results.setdefault((row["backbone"], arm), []).append(read_figures(row, folder / row["run"]))
    Console(width=140).print(table(results))
    if arguments.plot:
        draw(results, arguments.plot)
    return 1 if has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
