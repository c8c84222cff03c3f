r"""Train every core on the same tasks, with the same number of parameters: which one for which task?

python -m benchmarks.which run                                    # hours; finished runs are skipped
python -m benchmarks.which run --cores lru gru --tasks n_back --seeds 0
python -m benchmarks.which speed                                  # 15 minutes: steps a second
python -m benchmarks.which table                                  # Markdown, from all results so far

The width of each core is chosen so that the agent has about 100,000 parameters. All other options are those of the
task. Each run has the same number of steps. It adds one row to benchmarks/results/which.csv: greedy success (or return)
after training. Speeds are measured apart from these runs: environment steps per second of processor time, collection
and updates together, one thread.
"""

from __future__ import annotations

import argparse
import itertools
import time
from contextlib import closing
from pathlib import Path

from benchmarks.runs import Row, RunTable, train, with_interval
from cyborg_torchrl import load_config
from cyborg_torchrl.training.builders import build_agent, build_env, build_trainer, prepare_process

RUNS = RunTable(
    Path(__file__).parent / "results" / "which.csv",
    names=("core", "task", "seed"),
    values=("hidden_size", "parameters", "steps", "score"),
)
SPEEDS = RunTable(Path(__file__).parent / "results" / "which_speed.csv", ("core", "task"), ("steps_per_second",))
PARAMETERS = 100_000
WIDTHS = range(16, 513, 8)

TASKS = {
    "delayed_cue 1,000": ["env=delayed_cue", "env.horizon=1000", "train.total_timesteps=200000"],
    "copy_memory": ["env=copy_memory", "env.level=easy", "train.total_timesteps=500000"],
    "assoc_recall, 16 pairs": ["env=assoc_recall", "env.pairs=16", "env.horizon=50", "train.total_timesteps=500000"],
    "n_back": ["env=n_back", "env.level=easy", "train.total_timesteps=300000"],
    "RepeatPreviousHard": ["env=popgym", "id=popgym-RepeatPreviousHard-v0", "train.total_timesteps=300000"],
    "endless_tmaze": ["env=endless_tmaze", "train.total_timesteps=400000"],
}
"""Overrides by task. The score of RepeatPreviousHard is the return, of the others success."""

CORES = {
    name: [f"backbone={name}"]
    for name in (
        "lru", "gru", "lstm", "rnn", "min_gru", "bistable", "attention", "ffm", "gated_delta", "mamba", "mamba2",
        "mamba_gru", "pseudo_mamba",
    )
} | {
    "lru, complex": ["backbone=lru", "backbone.is_complex=true"],
    "lru with pmm": ["backbone=lru", "memory=pmm"],
    "gru without memory": ["backbone=gru", "train.recurrent_mode=none"],
}  # fmt: skip
"""Overrides by core; the last one is the control."""


def number_of_parameters(overrides: list[str], hidden_size: int) -> int:
    """Return the parameters of an agent."""
    cfg = load_config(overrides=[*overrides, f"backbone.hidden_size={hidden_size}", "env.num_envs=1"])
    with closing(build_env(cfg)) as env:
        return sum(parameter.numel() for parameter in build_agent(cfg, env).parameters())


def width_for(overrides: list[str]) -> tuple[int, int]:
    """Return the width whose number of parameters is nearest to the budget, and this number."""
    low, high = 0, len(WIDTHS) - 1
    while high - low > 1:  # the number of parameters grows with the width
        middle = (low + high) // 2
        low, high = (middle, high) if number_of_parameters(overrides, WIDTHS[middle]) < PARAMETERS else (low, middle)
    sizes = {WIDTHS[index]: number_of_parameters(overrides, WIDTHS[index]) for index in (low, high)}
    width = min(sizes, key=lambda width: abs(sizes[width] - PARAMETERS))
    return width, sizes[width]


def train_core(core: str, task: str, seed: int) -> Row:
    """Train one agent, and return its row."""
    overrides = [*TASKS[task], *CORES[core]]
    width, parameters = width_for(overrides)
    summary = train([*overrides, f"backbone.hidden_size={width}", f"train.seed={seed}"])
    return {
        "core": core,
        "task": task,
        "seed": seed,
        "hidden_size": width,
        "parameters": parameters,
        "steps": summary["total_timesteps"],
        "score": summary["mean_reward"] if summary["success_rate"] is None else summary["success_rate"],
    }


def measure_speed(core: str, task: str, updates: int = 2) -> Row:
    """Time some updates of one agent after a first one, and return its row. All updates have all their epochs."""
    overrides = [*TASKS[task], *CORES[core], "train.target_kl=null"]
    cfg = load_config(overrides=[*overrides, f"backbone.hidden_size={width_for(overrides)[0]}"])
    prepare_process(cfg)
    trainer = build_trainer(cfg).trainer
    with closing(trainer):
        runs = trainer.run()
        next(runs)
        steps, begun = trainer.num_steps, time.process_time()
        for _ in range(updates):
            next(runs)
        seconds = time.process_time() - begun
        return {"core": core, "task": task, "steps_per_second": round((trainer.num_steps - steps) / seconds)}


def table() -> str:
    """Return mean score [95 % interval] and steps a second of each core and task as Markdown."""
    lines = ["| core | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 1) + "|"]
    for core in CORES:
        cells: list[str] = []
        for task in TASKS:
            scores = RUNS.column("score", core=core, task=task)
            speeds = SPEEDS.column("steps_per_second", core=core, task=task)
            cells.append(", ".join([with_interval(scores)] * bool(scores) + [f"{speed:,.0f}/s" for speed in speeds]))
        lines.append(f"| {core} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train, and add a row for each run")
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    timing = commands.add_parser("speed", help="time two updates, and add a row for each core and task")
    for command in (running, timing):
        command.add_argument("--cores", nargs="+", default=list(CORES), choices=list(CORES))
        command.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    commands.add_parser("table", help="print the results as Markdown")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table())
    elif arguments.command == "speed":
        for task, core in itertools.product(arguments.tasks, arguments.cores):
            if not SPEEDS.has(core, task):
                SPEEDS.add(measure_speed(core, task))
    else:
        for seed, task, core in itertools.product(arguments.seeds, arguments.tasks, arguments.cores):
            if not RUNS.has(core, task, seed):
                RUNS.add(train_core(core, task, seed))


if __name__ == "__main__":
    main()
