r"""Train five agents on POPGym under the protocol of its paper, and compare with its figures.

    python -m benchmarks.popgym run                              # everything. This takes days of one core.
    python -m benchmarks.popgym run --ids RepeatPreviousHard CountRecallEasy --agents attention --seeds 0 1 2
    python -m benchmarks.popgym table                            # Markdown, from all results so far.
    python -m benchmarks.popgym plot docs/figures/popgym.png

A run has `--config popgym_paper` and nothing else but the id, the backbone, the seed and the steps. It is first trained
for the smallest number of `--steps`. Only if its greedy return is below 0.98, it is trained again for the next number,
from the start. Each run adds one row to benchmarks/results/popgym.csv: MMER, the mean return of 1,024 greedy episodes
after training, steps, and steps a second. Runs that have a row are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from benchmarks.runs import Row, RunTable, train, with_interval
from cyborg_torchrl.envs.popgym.build import FAMILIES, native_ids
from cyborg_torchrl.memory_benchmarks.published import published_scores

RUNS = RunTable(
    Path(__file__).parent / "results" / "popgym.csv",
    names=("id", "agent", "seed"),
    values=("mmer", "greedy_return", "steps", "steps_per_second", "seconds"),
)
AGENTS = {
    "lru": ["backbone=lru"],
    "gru": ["backbone=gru"],
    "attention": ["backbone=attention"],
    "attention and gru": ["backbone=stack", "backbone.layers=[attention,gru]"],
    "no memory": ["backbone=gru", "train.recurrent_mode=none"],
}
"""Overrides by agent; the last one is the control."""
NAMES = tuple(name.removeprefix("popgym-").removesuffix("-v0") for name in native_ids())
SOLVED = 0.98
"""Greedy return from which no longer training is tried."""


def train_agent(name: str, agent: str, seed: int, budgets: list[int]) -> Row:
    """Train an agent with growing numbers of steps until it solves the task, and return the row of the last run."""
    overrides = [f"id=popgym-{name}-v0", *AGENTS[agent], f"train.seed={seed}"]
    summary: Row = {}
    for steps in budgets:
        summary = train([*overrides, f"train.total_timesteps={steps}"], "--config", "popgym_paper")
        if summary["mean_reward"] >= SOLVED:
            break
    return {
        "id": name,
        "agent": agent,
        "seed": seed,
        "mmer": round(summary["mmer"], 4),
        "greedy_return": round(summary["mean_reward"], 4),
        "steps": summary["total_timesteps"],
        "steps_per_second": summary["steps_per_second"],
        "seconds": summary["total_seconds"],
    }


def table() -> str:
    """Return the MMER of each id and agent, with its 95 % interval over seeds, and the published ones, as Markdown."""
    lines = ["| task | " + " | ".join(AGENTS) + " | paper: best of 13 | paper: gru |", "|---" * (len(AGENTS) + 3) + "|"]
    for name in NAMES:
        scores = {agent: RUNS.column("mmer", id=name, agent=agent) for agent in AGENTS}
        if not any(scores.values()):
            continue
        best = max((max(values) for values in scores.values() if values), default=0.0)
        cells = [
            "" if not values else f"**{with_interval(values)}**" if max(values) == best else with_interval(values)
            for values in scores.values()
        ]
        published = published_scores().get(f"popgym-{name}-v0")
        cells += [f"{published.best:.2f} ({published.agent})", f"{published.gru:.2f}"] if published else ["", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_of_ours(name: str) -> float | None:
    """Return the mean MMER of our best agent on an id; None if there is no run."""
    scores = [RUNS.column("mmer", id=name, agent=agent) for agent in AGENTS]
    return max((sum(values) / len(values) for values in scores if values), default=None)


def summary() -> str:
    """Return one line: on how many published cells our best agent is at or above the paper's best."""
    published = {name: published_scores().get(f"popgym-{name}-v0") for name in NAMES}
    pairs = [(best_of_ours(name), score.best) for name, score in published.items() if score]
    compared = [(ours, theirs) for ours, theirs in pairs if ours is not None]
    wins = sum(round(ours, 3) >= theirs for ours, theirs in compared)
    return (
        f"At or above the paper's best on {wins} of {len(compared)} cells; {len(pairs) - len(compared)} were not run."
    )


def plot(path: str) -> None:
    """Draw our best agent, the control without memory and the paper's best, for each published id."""
    import matplotlib.pyplot as plt

    published = {name: score for name in NAMES if (score := published_scores().get(f"popgym-{name}-v0"))}
    shown = [name for name in published if best_of_ours(name) is not None]
    figure, axis = plt.subplots(figsize=(7, 0.26 * len(shown) + 1.2), layout="constrained")
    rows = range(len(shown))
    control = [RUNS.column("mmer", id=name, agent="no memory") for name in shown]
    axis.plot([published[name].best for name in shown], rows, "D", color="#c24e00", label="paper: best of 13 models")
    axis.plot([best_of_ours(name) for name in shown], rows, "o", color="#0067a8", label="this package: best of 4")
    means = [sum(values) / len(values) if values else float("nan") for values in control]
    axis.plot(means, rows, "|", color="#4d5a66", markersize=9, label="this package, no memory")
    axis.set_yticks(rows, shown, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("MMER: largest mean return of an epoch of 65,536 steps")
    axis.grid(axis="x", linewidth=0.5)
    axis.legend(loc="upper center", bbox_to_anchor=(0.4, 1.12), ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train, and add a row for each run")
    running.add_argument(
        "--ids", nargs="+", default=list(NAMES), choices=NAMES, metavar="ID", help="such as MineSweeperEasy"
    )
    running.add_argument(
        "--families", nargs="+", choices=sorted(FAMILIES), metavar="FAMILY", help="such as RepeatFirst"
    )
    running.add_argument("--agents", nargs="+", default=list(AGENTS), choices=list(AGENTS), metavar="AGENT")
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    running.add_argument(
        "--steps", nargs="+", type=int, default=[500_000, 3_000_000, 15_000_000], help="growing budgets"
    )
    commands.add_parser("table", help="print the results as Markdown")
    commands.add_parser("plot", help="draw the figure").add_argument("path")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(f"{table()}\n\n{summary()}")
    elif arguments.command == "plot":
        plot(arguments.path)
    else:
        ids = [f"{family}{level}" for family in arguments.families or () for level in FAMILIES[family].levels]
        for seed, name, agent in itertools.product(arguments.seeds, ids or arguments.ids, arguments.agents):
            if not RUNS.has(name, agent, seed):
                RUNS.add(train_agent(name, agent, seed, arguments.steps))


if __name__ == "__main__":
    main()
