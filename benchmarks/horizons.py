r"""Evaluate trained agents on episodes longer than those of training: does the memory last?

    cyborg-torchrl sweep backbone=gru,lru,bistable 'train.seed=range(3)' env.horizon=100 \
        train.total_timesteps=200000 --folder runs/horizons

python -m benchmarks.horizons runs/horizons                          # greedy success at 1, 3, 10, 30, 100 horizons
python -m benchmarks.horizons runs/horizons --factors 1 10 --episodes 100 --output horizons.csv

Each run of the sweep is evaluated at multiples of the `env.horizon` that it was trained with. One row of a CSV file
holds one evaluation. Rows that are there are not computed again, so an interrupted command continues. The table goes to
stdout as Markdown.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path

import torch
from omegaconf import OmegaConf

from cyborg_torchrl.training.loading import load_agent
from cyborg_torchrl.training.run_evaluation import evaluate_agent
from cyborg_torchrl.training.stats import mean_interval

COLUMNS = ("core", "task", "horizon", "factor", "seed", "success")
FACTORS = (1, 3, 10, 30, 100)


def core_name(run: Path) -> str:
    """Return the backbone of a run, with the options that its command gave."""
    cfg = OmegaConf.load(run / "config.yaml")
    given = json.loads((run / "job.json").read_text())["overrides"]
    options = [f"{key.removeprefix('backbone.')}={value}" for key, value in given.items() if "backbone." in key]
    return " ".join([cfg.backbone.name, *options])


def evaluate_run(run: Path, factor: int, episodes: int) -> dict[str, object]:
    """Evaluate one run at a multiple of its horizon."""
    trained, _, _ = load_agent(str(run), [])
    horizon = trained.env.horizon
    cfg, agent, _ = load_agent(str(run), [f"env.horizon={factor * horizon}"])
    torch.manual_seed(cfg.train.seed)
    success = evaluate_agent(cfg, agent, episodes).success_rate
    values = (core_name(run), cfg.env.name, horizon, factor, cfg.train.seed, success)
    return dict(zip(COLUMNS, values, strict=True))


def evaluate_all(folder: Path, factors: list[int], episodes: int, output: Path) -> None:
    """Evaluate every finished run of a sweep, and append the rows to a CSV file."""
    runs = sorted(path.parent for path in folder.glob("*/summary.json"))
    if not runs:
        raise SystemExit(f"no finished run in {folder}.")
    is_new = not output.exists()
    known = {(row["core"], row["task"], row["seed"], row["horizon"], row["factor"]) for row in read(output)}
    with output.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for run in runs:
            cfg = OmegaConf.load(run / "config.yaml")
            for factor in factors:
                key = (core_name(run), cfg.env.name, str(cfg.train.seed), str(cfg.env.horizon), str(factor))
                if key not in known:
                    writer.writerow(evaluate_run(run, factor, episodes))
                    file.flush()


def read(output: Path) -> list[dict[str, str]]:
    """Return the rows of the CSV file; [] if there is none."""
    if not output.exists():
        return []
    with output.open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]]) -> str:
    """Return mean success over seeds, with the lowest and the highest seed, as Markdown."""
    factors = sorted({int(row["factor"]) for row in rows})
    horizons = sorted({int(row["horizon"]) for row in rows})
    names = [f"{factor} x" if len(horizons) > 1 else f"{factor * horizons[0]:,}" for factor in factors]
    lines = ["| core | task | trained at | seeds | " + " | ".join(names) + " |", "|---" * (4 + len(names)) + "|"]
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[row["core"], row["task"], row["horizon"]].append(row)
    for (core, task, horizon), members in sorted(groups.items()):
        cells: list[str] = []
        for factor in factors:
            scores = torch.tensor([float(row["success"]) for row in members if int(row["factor"]) == factor])
            interval = mean_interval(scores.double()) if len(scores) > 1 else None
            limits = f" [{max(0, interval[0]):.2f}, {min(1, interval[1]):.2f}]" if interval else ""
            cells.append(f"{scores.mean():.2f}{limits}" if len(scores) else "")
        seeds = len({row["seed"] for row in members})
        lines.append(f"| {core} | {task} | {horizon} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a sweep")
    parser.add_argument("--factors", nargs="+", type=int, default=list(FACTORS), help="multiples of the horizon")
    parser.add_argument("--episodes", type=int, default=250, help="episodes of each evaluation (%(default)s)")
    parser.add_argument("--output", type=Path, help="the CSV file (FOLDER/horizons.csv)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    output = arguments.output or arguments.folder / "horizons.csv"
    evaluate_all(arguments.folder, arguments.factors, arguments.episodes, output)
    print(table(read(output)))


if __name__ == "__main__":
    main()
