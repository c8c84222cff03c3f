r"""Train with each fault that was found in a library seeded into this package: what does it cost?

python -m benchmarks.honesty.cost run                 # about 20 minutes; finished runs are not repeated
python -m benchmarks.honesty.cost table               # Markdown, from all results so far

Delayed cue with 100 blank steps, in rollouts that begin and end in the middle of episodes. It has no time-outs, so the
fault at time-outs is seeded into Pendulum-v1, where every episode is one. A run adds one row to
benchmarks/honesty/results/cost.csv.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.modules import recurrent_mode

from cyborg_torchrl import load_config
from cyborg_torchrl.data.rollout import Rollout
from cyborg_torchrl.modules.backbone import Backbone
from cyborg_torchrl.objectives import advantages
from cyborg_torchrl.training.experiment import run_experiment
from cyborg_torchrl.training.stats import mean_interval

RESULTS = Path(__file__).parent / "results" / "cost.csv"
COLUMNS = ("task", "fault", "seed", "score")
SEEDS = (0, 1, 2)
TASKS = {
    "delayed_cue": [
        *("env=delayed_cue", "env.horizon=100", "backbone=gru", "train=tbptt", "train.n_steps=256"),
        *("train.seq_len=128", "train.total_timesteps=200000", "collector=single"),
    ],
    "Pendulum-v1": ["env=gymnasium", "env.id=Pendulum-v1", "train.total_timesteps=200000"],
}


@contextmanager
def states_after_each_step() -> Generator[None]:
    """Store the state after each step where the update expects the state before it."""
    original = Rollout.from_steps

    def from_steps(steps: TensorDictBase, state_keys: Any, state_steps: Any) -> Rollout:
        late = steps.copy()
        for key in state_keys:
            value = steps.get(key)
            late.set(key, torch.cat([value[:, 1:], value[:, -1:]], 1))
        return original(late, state_keys, state_steps)

    with patch.object(Rollout, "from_steps", staticmethod(from_steps)):
        yield


@contextmanager
def no_restart() -> Generator[None]:
    """Carry the memory of an episode into the next, in acting and in the update."""
    original = Backbone._inputs

    def inputs(self: Backbone, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        features, is_init = original(self, tensordict)
        return features, torch.zeros_like(is_init)

    with patch.object(Backbone, "_inputs", inputs):
        yield


@contextmanager
def memory_lost_at_each_update() -> Generator[None]:
    """Act with an empty memory after each change of the parameters. The update starts from the memory before it."""
    original = Backbone._inputs
    versions: dict[int, int] = {}

    def inputs(self: Backbone, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        features, is_init = original(self, tensordict)
        if recurrent_mode():
            return features, is_init
        version = sum(parameter._version for parameter in self.parameters())
        is_same = versions.setdefault(id(self), version) == version
        versions[id(self)] = version
        return features, is_init if is_same else torch.ones_like(is_init)

    with patch.object(Backbone, "_inputs", inputs):
        yield


@contextmanager
def value_before_time_out() -> Generator[None]:
    """At a time-out, use the value of the last observation that was acted on, not of the one after it."""
    original = advantages.generalized_advantage

    def advantage(
        reward: Tensor, value: Tensor, following: Tensor, terminated: Tensor, done: Tensor, *rest: Any
    ) -> Any:
        return original(reward, value, torch.where(done & ~terminated, value, following), terminated, done, *rest)

    with patch.object(advantages, "generalized_advantage", advantage):
        yield


@contextmanager
def ends_one_row_late() -> Generator[None]:
    """Read in each row whether the next one ended an episode, and take the value of the next row in any case."""
    original = advantages.generalized_advantage

    def advantage(
        reward: Tensor, value: Tensor, following: Tensor, terminated: Tensor, done: Tensor, *rest: Any
    ) -> Any:
        late = torch.cat([done[:, 1:], done[:, -1:]], 1)
        return original(reward, value, torch.cat([value[:, 1:], following[:, -1:]], 1), late, late, *rest)

    with patch.object(advantages, "generalized_advantage", advantage):
        yield


Fault = tuple[str, list[str], Callable[[], Any]]
FAULTS: dict[str, Fault] = {
    "none": ("delayed_cue", [], nullcontext),
    "states after each step (skrl 2.0.0)": ("delayed_cue", [], states_after_each_step),
    "windows of four steps from an empty memory (tianshou 2.0.1)": (
        "delayed_cue",
        ["train.start_state=initial", "train.seq_len=4"],
        nullcontext,
    ),
    "no restart where an episode begins (PufferLib 3.0.0)": ("delayed_cue", [], no_restart),
    "memory lost at each update (TorchRL's TransformerModule, nightly of 2026-10-27)": (
        "delayed_cue",
        [],
        memory_lost_at_each_update,
    ),
    "ends of episodes read one row late (AgileRL 2.58.0)": ("delayed_cue", [], ends_one_row_late),
    "none, Pendulum-v1": ("Pendulum-v1", [], nullcontext),
    "value before a time-out (rsl_rl 5.5.1)": ("Pendulum-v1", [], value_before_time_out),
}
"""Task, options and patch of each fault."""


def train(fault: str, seed: int) -> float:
    """Train and evaluate with a fault; return the greedy success rate, or the return where there is none."""
    task, options, seeded = FAULTS[fault]
    with tempfile.TemporaryDirectory() as scratch, seeded():
        overrides = [
            *TASKS[task],
            *options,
            f"train.seed={seed}",
            "logger.progress=false",
            f"logger.base_dir={scratch}",
        ]
        summary = run_experiment(load_config(overrides=overrides))
    return summary["mean_reward"] if summary["success_rate"] is None else summary["success_rate"]


def read() -> list[dict[str, str]]:
    """Return the rows of the CSV file; [] if there is none."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def run() -> None:
    """Train the missing runs, and add a row for each."""
    known = {(row["fault"], int(row["seed"])) for row in read()}
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for fault, seed in itertools.product(FAULTS, SEEDS):
            if (fault, seed) not in known:
                score = round(train(fault, seed), 3)
                writer.writerow(dict(zip(COLUMNS, (FAULTS[fault][0], fault, seed, score), strict=True)))
                file.flush()
                print(f"{fault}, seed {seed}: {score}", file=sys.stderr)


def table() -> str:
    """Return the mean score [95 % interval] of each fault as Markdown."""
    rows = read()
    lines = ["| task | fault | score |", "|---|---|---|"]
    for fault, (task, _, _) in FAULTS.items():
        scores = torch.tensor([float(row["score"]) for row in rows if row["fault"] == fault], dtype=torch.float64)
        if len(scores) > 1:
            low, high = mean_interval(scores)
            lines.append(
                f"| {task} | {fault.removesuffix(f', {task}')} | {scores.mean():.2f} [{low:.2f}, {high:.2f}] |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    if parser.parse_args().command == "table":
        print(table())
    else:
        torch.set_num_threads(1)
        run()


if __name__ == "__main__":
    main()
