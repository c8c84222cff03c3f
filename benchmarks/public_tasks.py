r"""Compare this package with RecurrentPPO of sb3-contrib on public tasks: same steps, same machine.

python -m benchmarks.public_tasks run --tasks Hopper Walker2d --arms ours sb3 --seeds 0 1 2
python -m benchmarks.public_tasks table        # Markdown, from all results so far
python -m benchmarks.public_tasks plot curves.png

Our arm is the command line with nothing but the task's id, its visible numbers and the number of steps. The other arm
takes the settings of rl-baselines3-zoo (`hyperparams/ppo_lstm.yml`). Its entries for MuJoCo tasks (one environment,
minibatches of 32 steps) make 30 to 100 steps a second, so the robots take its settings for the same robots in Bullet.
`--arms sb3-mujoco` runs those entries. Acrobot has no entry there. It takes that of PPO without memory, with the LSTM
of the CartPole entry.

Each run writes one CSV file: steps, seconds of CPU time, mean return while training, and at the end a row with the mean
return of 100 greedy episodes. Runs that are finished are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.wrappers import FlattenObservation, TransformObservation

from cyborg_torchrl.data.chunks import ceil_div
from cyborg_torchrl.training.stats import mean_interval

ARMS = ("ours", "sb3", "sb3-mujoco")
RESULTS = Path(__file__).parent / "results" / "public_tasks"
EVALUATION_EPISODES = 100


@dataclass(frozen=True)
class Task:
    """A public task: the same for all arms."""

    env_id: str
    total_timesteps: int
    visible: list[int] | None
    """Numbers of the observation that the agent sees; None: all."""
    ours: list[str] = field(default_factory=list)
    """Overrides of our arm: none but the environment."""
    zoo: str | None = "robot"
    """Settings of the sb3 arm; None: the task has only our arm."""


TASKS = {
    "CartPole": Task("CartPole-v1", 100_000, [0, 2], zoo="CartPole"),
    "Pendulum-full": Task("Pendulum-v1", 200_000, None, zoo="Pendulum"),
    "Pendulum": Task("Pendulum-v1", 200_000, [0, 1], zoo="Pendulum"),
    "MountainCar": Task("MountainCarContinuous-v0", 300_000, [0], zoo="MountainCar"),
    "Acrobot": Task("Acrobot-v1", 200_000, [0, 1, 2, 3], zoo="Acrobot"),
    "Hopper": Task("Hopper-v5", 1_000_000, list(range(5)), zoo="robot_linear_clip"),
    "HalfCheetah": Task("HalfCheetah-v5", 1_000_000, list(range(8))),
    "Walker2d": Task("Walker2d-v5", 1_000_000, list(range(8)), zoo="robot_linear_clip"),
    "MemoryS7": Task("MiniGrid-MemoryS7-v0", 500_000, None, ["env=minigrid"], zoo="MiniGrid"),
    "MemoryS13Random": Task("MiniGrid-MemoryS13Random-v0", 2_000_000, None, ["env=minigrid"], zoo=None),
    "CountRecall": Task("popgym-CountRecallEasy-v0", 3_000_000, None, ["env=popgym"], zoo=None),
}
"""Tasks by name. "Pendulum", "CartPole", "MountainCar", "Acrobot" hide velocities; robots show only their positions."""


def linear(start: float) -> Callable[[float], float]:
    """Return a schedule from `start` to zero; its argument is the share of steps that is left."""
    return lambda left: left * start


def zoo_settings(name: str) -> tuple[int, dict[str, Any]]:
    """Return the number of environments, and the arguments of RecurrentPPO, as rl-baselines3-zoo has them."""
    relu, one = torch.nn.ReLU, {"pi": [64], "vf": [64]}
    small = {"ortho_init": False, "activation_fn": relu, "lstm_hidden_size": 64, "net_arch": one}
    robot = {"batch_size": 128, "n_steps": 256, "gamma": 0.99, "gae_lambda": 0.9, "n_epochs": 10}
    robot["policy_kwargs"] = {
        "ortho_init": False,
        "activation_fn": relu,
        "net_arch": {"pi": [], "vf": []},
        "lstm_hidden_size": 128,
    }
    mujoco = {
        "log_std_init": -2,
        "ortho_init": False,
        "activation_fn": relu,
        "net_arch": {"pi": [256] * 2, "vf": [256] * 2},
    }
    settings: dict[str, tuple[int, dict[str, Any]]] = {
        "Pendulum": (
            4,
            {"n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10, "learning_rate": 1e-3}
            | {"use_sde": True, "sde_sample_freq": 4, "policy_kwargs": small},
        ),
        "CartPole": (
            8,
            {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20}
            | {"learning_rate": linear(1e-3), "clip_range": linear(0.2), "policy_kwargs": small},
        ),
        "MountainCar": (
            8,
            {"batch_size": 256, "n_steps": 1024, "gamma": 0.9999, "learning_rate": 7.77e-5, "ent_coef": 0.00429}
            | {"clip_range": 0.1, "n_epochs": 10, "gae_lambda": 0.9, "max_grad_norm": 5, "vf_coef": 0.19}
            | {"use_sde": True, "sde_sample_freq": 8}
            | {"policy_kwargs": {"ortho_init": False, "lstm_hidden_size": 32, "net_arch": one}},
        ),
        "Acrobot": (
            16,
            {"n_steps": 256, "gae_lambda": 0.94, "gamma": 0.99, "n_epochs": 4} | {"policy_kwargs": small},
        ),
        "robot": (16, robot),
        "robot_linear_clip": (16, robot | {"clip_range": linear(0.4)}),
        "MiniGrid": (
            8,
            {"n_steps": 128, "batch_size": 64, "gae_lambda": 0.95, "gamma": 0.99, "n_epochs": 10}
            | {"learning_rate": 2.5e-4, "clip_range": 0.2},
        ),
        "Hopper": (
            1,
            {"batch_size": 32, "n_steps": 512, "gamma": 0.999, "learning_rate": 9.80828e-5, "ent_coef": 0.00229519}
            | {"clip_range": 0.2, "n_epochs": 5, "gae_lambda": 0.99, "max_grad_norm": 0.7, "vf_coef": 0.835671}
            | {"policy_kwargs": mujoco},
        ),
        "HalfCheetah": (
            1,
            {"batch_size": 64, "n_steps": 512, "gamma": 0.98, "learning_rate": 2.0633e-5, "ent_coef": 0.000401762}
            | {"clip_range": 0.1, "n_epochs": 20, "gae_lambda": 0.92, "max_grad_norm": 0.8, "vf_coef": 0.58096}
            | {"policy_kwargs": mujoco},
        ),
        "Walker2d": (
            1,
            {"batch_size": 32, "n_steps": 512, "gamma": 0.99, "learning_rate": 5.05041e-5, "ent_coef": 0.000585045}
            | {"clip_range": 0.1, "n_epochs": 20, "gae_lambda": 0.95, "max_grad_norm": 1, "vf_coef": 0.871923},
        ),
    }
    return settings[name]


def make_env(task: Task) -> gymnasium.Env[Any, Any]:
    """Make the environment of the sb3 arm: only the visible numbers, MiniGrid's picture as one vector."""
    from stable_baselines3.common.monitor import Monitor

    if task.env_id.startswith("MiniGrid"):
        from minigrid.wrappers import ImgObsWrapper

        return Monitor(FlattenObservation(ImgObsWrapper(gymnasium.make(task.env_id))))
    env = gymnasium.make(task.env_id)
    if task.visible is not None:
        entries = np.array(task.visible)
        space = Box(-np.inf, np.inf, (len(entries),), np.float32)
        env = TransformObservation(env, lambda observation: observation[entries].astype(np.float32), space)
    return Monitor(env)


def train_sb3(task: Task, zoo: str, seed: int) -> list[dict[str, float]]:
    """Train RecurrentPPO; return the rows of its CSV file."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    torch.set_num_threads(1)
    num_envs, options = zoo_settings(zoo)
    env = VecNormalize(DummyVecEnv([lambda: make_env(task)] * num_envs), gamma=options["gamma"])
    model = RecurrentPPO("MlpLstmPolicy", env, seed=seed, device="cpu", **options)
    rows: list[dict[str, float]] = []
    started = time.process_time()

    class Recorder(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            returns = [episode["r"] for episode in self.model.ep_info_buffer or []]
            row = {"steps": self.num_timesteps, "cpu_seconds": time.process_time() - started}
            rows.append(row | {"mean_return": float(np.mean(returns)) if returns else float("nan")})

    model.learn(task.total_timesteps, callback=Recorder())
    seconds = time.process_time() - started
    env.training = env.norm_reward = False
    returns, _ = evaluate_policy(model, env, EVALUATION_EPISODES, deterministic=True)
    rows.append({"steps": model.num_timesteps, "cpu_seconds": seconds, "greedy_return": float(returns)})
    return rows


def train_ours(task: Task, seed: int) -> list[dict[str, float]]:
    """Train with the command line; return the rows of its CSV file."""
    options = task.ours or ["env=gymnasium"]
    if task.visible is not None:
        options = [*options, f"env.visible={json.dumps(task.visible, separators=(',', ':'))}"]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "cyborg_torchrl", "train", *options, f"id={task.env_id}", f"train.seed={seed}"]
        command += [f"train.total_timesteps={task.total_timesteps}", f"logger.eval_episodes={EVALUATION_EPISODES}"]
        command += [f"logger.base_dir={scratch}", "logger.run_name=run", "logger.progress=false"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before  # of start and evaluation too
        with (Path(scratch) / "run" / "logs" / "metrics.csv").open(newline="") as file:
            log = list(csv.DictReader(file))
    summary = json.loads(output.splitlines()[-1])
    rows = [{"steps": float(row["steps"]), "mean_return": float(row["mean_reward"] or "nan")} for row in log]
    last = {"steps": rows[-1]["steps"], "cpu_seconds": seconds, "greedy_return": summary["mean_reward"]}
    return [*rows, last]


def run(name: str, arm: str, seed: int) -> None:
    """Train one arm on a task with a seed, and write its CSV file, if there is none yet."""
    path = RESULTS / f"{name}_{arm}_{seed}.csv"
    if path.exists():
        return
    task = TASKS[name]
    if arm == "ours":
        rows = train_ours(task, seed)
    elif task.zoo is None:
        return
    else:
        rows = train_sb3(task, name if arm == "sb3-mujoco" else task.zoo, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["steps", "cpu_seconds", "mean_return", "greedy_return"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: round(value, 4) for key, value in row.items()} for row in rows)
    print(f"{path.stem}: {rows[-1]['greedy_return']:.2f}, {rows[-1]['steps'] / rows[-1]['cpu_seconds']:.0f} steps/s")


def read(name: str, arm: str) -> list[list[dict[str, float]]]:
    """Return the rows of all finished runs of an arm on a task."""
    runs: list[list[dict[str, float]]] = []
    for path in sorted(RESULTS.glob(f"{name}_{arm}_[0-9]*.csv")):
        with path.open(newline="") as file:
            runs.append([{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(file)])
    return runs


def print_table() -> None:
    """Print the greedy returns and the speeds of all finished runs as Markdown."""
    arms = [arm for arm in ARMS if any(read(name, arm) for name in TASKS)]
    print("| task | steps | " + " | ".join(f"{arm}, return | {arm}, steps/s" for arm in arms) + " |")
    print("|---|---|" + "---|---|" * len(arms))
    for name, task in TASKS.items():
        cells: list[str] = []
        for arm in arms:
            runs = read(name, arm)
            returns = torch.tensor([rows[-1]["greedy_return"] for rows in runs], dtype=torch.float64)
            speeds = [rows[-1]["steps"] / rows[-1]["cpu_seconds"] for rows in runs]
            interval = mean_interval(returns) if len(runs) > 1 else None
            digits = 2 if abs(float(returns.mean())) < 10.0 else 1
            limits = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
            seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
            cells += [f"{returns.mean():.{digits}f}{limits} ({seeds})", f"{np.mean(speeds):.0f}"] if runs else ["", ""]
        print(f"| {name} | {task.total_timesteps:,} | " + " | ".join(cells) + " |")


def plot(path: str) -> None:
    """Draw the training curves of all finished runs into a picture."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, ceil_div(len(TASKS), 2), figsize=(14, 6), layout="constrained")
    for axis, name in zip(axes.flat, TASKS, strict=False):
        for arm, colour in zip(ARMS, ("C0", "C1", "C2"), strict=True):
            for number, rows in enumerate(read(name, arm)):
                curve = [(row["steps"], row["mean_return"]) for row in rows[:-1] if not np.isnan(row["mean_return"])]
                steps, returns = np.array(curve).reshape(-1, 2).T
                # The other arm logs the mean of its last 100 episodes, ours that of one update.
                width = max(3, len(returns) // 25) if arm == "ours" else 1
                means = [returns[max(0, i + 1 - width) : i + 1].mean() for i in range(len(returns))]
                axis.plot(steps / 1000, means, colour, alpha=0.8, label="" if number else arm)
        axis.set_title(name)
        axis.set_xlabel("steps / 1000")
    for unused in axes.flat[len(TASKS) :]:
        unused.set_axis_off()
    axes.flat[0].set_ylabel("return while training")
    axes.flat[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train, and write one CSV file for each run")
    running.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    running.add_argument("--arms", nargs="+", default=["ours", "sb3"], choices=ARMS)
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    commands.add_parser("table", help="print the results as Markdown")
    commands.add_parser("plot", help="draw the curves").add_argument("path")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print_table()
    elif arguments.command == "plot":
        plot(arguments.path)
    else:
        for seed, name, arm in itertools.product(arguments.seeds, arguments.tasks, arguments.arms):
            run(name, arm, seed)


if __name__ == "__main__":
    main()
