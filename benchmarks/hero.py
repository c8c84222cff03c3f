"""Draw the README's figure: greedy success on delayed cue at horizon 1000, three ways to train, one budget of steps.

    python benchmarks/hero.py run --output benchmarks/results/hero.csv
    python benchmarks/hero.py draw --input benchmarks/results/hero.csv --output docs/figures/hero.png

`run` appends one row per evaluated point. Finished pairs of arm and seed are skipped, so an interrupted run continues.
Every arm gets the same environment steps, epochs, minibatches, discount, CPU thread and evaluation episodes. The `sb3`
arms need `pip install -e ".[dev]"`.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cyborg_torchrl import PPOAgent, evaluate, load_config, make_env
from cyborg_torchrl.training.builders import build_trainer

HORIZON = 1000
CUES = 4
NUM_ENVS = 64
ROLLOUT_STEPS = HORIZON + 2  # the cue, the blank steps, the query: one whole episode
STEPS_PER_UPDATE = NUM_ENVS * ROLLOUT_STEPS
UPDATES = 12
EPISODES = 512  # of each evaluated point
EPOCHS, MINIBATCHES = 15, 8
TASK_ID = "cyborg_torchrl.envs.gym.ids:CyborgMemory/DelayedCue-v0"
COLUMNS = ("arm", "seed", "steps", "success", "episodes", "seconds", "cpu_seconds", "versions")

Score = Callable[[int], float]
"""Return the greedy success over fresh episodes, drawn with the given seed."""
Curve = Iterator[tuple[int, Score]]
"""The environment steps so far, and how to score the agent. Asking for the next item trains for one update."""


def train_ours(seed: int, overrides: Sequence[str] = ()) -> Curve:
    """Train this package's agent: the shipped configuration with a few overrides."""
    options = [
        f"env.horizon={HORIZON}",
        f"env.cues={CUES}",
        f"env.num_envs={NUM_ENVS}",
        f"train.total_timesteps={STEPS_PER_UPDATE * UPDATES}",
        f"train.n_epochs={EPOCHS}",
        f"train.num_minibatches={MINIBATCHES}",
        f"train.seed={seed}",
    ]
    trainer, agent, _ = build_trainer(load_config("memory_delayed_cue_recurrent", [*options, *overrides]))
    score = _ours_score(agent)
    yield 0, score
    for _ in trainer.run():
        yield trainer.num_steps, score
    trainer.close()


def _ours_score(agent: PPOAgent) -> Score:
    def score(seed: int) -> float:
        env = make_env("delayed_cue", num_envs=EPISODES, horizon=HORIZON, cues=CUES, seed=seed)
        env.append_transform(agent.backbone.make_tensordict_primer())
        return evaluate(agent, env, EPISODES).success_rate

    return score


def train_sb3(
    seed: int, *, learning_rate: float, gae_lambda: float = 0.0, gamma: float = 0.999, **policy_options: Any
) -> Curve:
    """Train sb3-contrib's RecurrentPPO on whole episodes; its learning rate falls linearly, as in our configuration."""
    from sb3_contrib import RecurrentPPO

    update = 0
    model = RecurrentPPO(
        "MlpLstmPolicy",
        _sb3_env(seed),
        n_steps=ROLLOUT_STEPS,
        batch_size=STEPS_PER_UPDATE // MINIBATCHES,
        n_epochs=EPOCHS,
        learning_rate=lambda _: learning_rate * (1.0 - update / UPDATES),
        gamma=gamma,
        gae_lambda=gae_lambda,
        policy_kwargs=policy_options,
        device="cpu",
        seed=seed,
    )
    score = _sb3_score(model)
    yield 0, score
    for update in range(UPDATES):  # noqa: B007 the learning rate reads it
        model.learn(STEPS_PER_UPDATE, reset_num_timesteps=False)
        yield model.num_timesteps, score


def _sb3_env(seed: int) -> Any:
    """Build the task as one of sb3's vector environments, with one call for all environments."""
    import gymnasium
    from stable_baselines3.common.vec_env import VecEnv

    env = gymnasium.make_vec(TASK_ID, num_envs=NUM_ENVS, horizon=HORIZON, cues=CUES)

    class Task(VecEnv):
        def __init__(self) -> None:
            super().__init__(NUM_ENVS, env.single_observation_space, env.single_action_space)
            self.next_seed: int | None = seed

        def reset(self) -> np.ndarray:
            observation, _ = env.reset(seed=self.next_seed)
            self.next_seed = None
            return observation

        def step_async(self, actions: np.ndarray) -> None:
            self.actions = actions

        def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
            observation, reward, is_over, _, _ = env.step(self.actions)
            infos: list[dict[str, Any]] = [{} for _ in range(NUM_ENVS)]
            if is_over.all():  # all episodes have the same length, so they end together
                for info, last in zip(infos, observation, strict=True):
                    info["terminal_observation"] = last
                observation = self.reset()
            return observation, reward, is_over, infos

        def close(self) -> None:
            env.close()

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [None] * NUM_ENVS

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            return [None] * NUM_ENVS

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            return [False] * NUM_ENVS

    return Task()


def _sb3_score(model: Any) -> Score:
    import gymnasium

    def score(seed: int) -> float:
        env = gymnasium.make_vec(TASK_ID, num_envs=EPISODES, horizon=HORIZON, cues=CUES)
        observation, _ = env.reset(seed=seed)
        state, is_start = None, np.ones(EPISODES, dtype=bool)
        while True:
            action, state = model.predict(observation, state, is_start, deterministic=True)
            observation, _, is_start, _, info = env.step(action)
            if is_start.all():
                return float(info["success"].mean())

    return score


CHUNKS = ("train.recurrent_mode=tbptt", "train.seq_len=128")
SHARED = {"lstm_hidden_size": 64, "net_arch": [], "shared_lstm": True, "enable_critic_lstm": False}
ARMS: dict[str, Callable[[int], Curve]] = {
    # the learning rate of RL Zoo's CartPoleNoVel-v1 (ppo_lstm.yml: lin_0.001); one LSTM of the same width as ours
    "sb3": lambda seed: train_sb3(seed, learning_rate=1e-3, **SHARED),
    "zero_started": lambda seed: train_ours(seed, [*CHUNKS, "train.start_state=initial"]),
    "ours": train_ours,
    # not drawn: other settings, to see that the figure does not depend on them
    "ours_lstm": lambda seed: train_ours(seed, ["backbone=lstm"]),
    "stored_chunks": lambda seed: train_ours(seed, CHUNKS),
    "sb3_our_rate": lambda seed: train_sb3(seed, learning_rate=3e-3, **SHARED),
    "sb3_defaults": lambda seed: train_sb3(seed, learning_rate=3e-4, gae_lambda=0.95),
}


class Style(NamedTuple):
    """How an arm is drawn; the colours differ in grey and for colour-blind eyes."""

    label: str
    position: tuple[int, float]
    """Environment steps and success where the label begins."""
    colour: str
    marker: str


STYLES = {
    "sb3": Style("sb3-contrib RecurrentPPO (LSTM)", (290_000, 0.33), "#C75200", "s"),
    "zero_started": Style(
        "same agent, but chunks of 128 steps\nthat start from zero states", (290_000, 0.08), "#666666", "^"
    ),
    "ours": Style(
        "cyborg_torchrl (lru): stored states,\ngradients through whole episodes", (290_000, 0.5), "#0072B2", "o"
    ),
}


def prepare_process() -> None:
    """Set one thread, flush denormals and keep freed memory: alike for all arms, and faster for small networks."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(option, value)


def run(arms: Sequence[str], seeds: Sequence[int], output: Path) -> None:
    """Train every arm with every seed, and append a row per point; finished pairs are skipped."""
    output.parent.mkdir(parents=True, exist_ok=True)
    prepare_process()
    for seed in seeds:
        for arm in arms:
            rows = read_rows(output)
            mine = [row for row in rows if (row["arm"], row["seed"]) == (arm, str(seed))]
            if len(mine) > UPDATES:
                continue
            write_rows(output, [row for row in rows if row not in mine])  # an interrupted pair starts again
            run_pair(arm, seed, output)


def run_pair(arm: str, seed: int, output: Path) -> None:
    """Train one arm with one seed. `seconds` and `cpu_seconds` count training alone, without the evaluations."""
    packages = ("torch", "torchrl", "cyborg-torchrl") if not arm.startswith("sb3") else ("torch", "sb3-contrib")
    versions = " ".join(f"{name}={version(name)}" for name in packages)
    torch.manual_seed(seed)
    seconds = cpu_seconds = 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    for number, (steps, score) in enumerate(ARMS[arm](seed)):
        seconds += time.perf_counter() - wall
        cpu_seconds += time.process_time() - cpu
        success = score(10_000 * (seed + 1) + number)
        row = (arm, seed, steps, f"{success:.4f}", EPISODES, f"{seconds:.1f}", f"{cpu_seconds:.1f}", versions)
        with output.open("a", newline="") as file:
            csv.writer(file).writerow(row)
        sys.stdout.write(f"{arm} seed {seed}: {success:.3f} after {steps:,} steps, {seconds:.0f} s\n")
        sys.stdout.flush()
        wall, cpu = time.perf_counter(), time.process_time()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a results file; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write a results file anew."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def draw(source: Path, output: Path) -> None:
    """Draw a bold line per arm, the mean over its seeds, and a thin line per seed."""
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    last = STEPS_PER_UPDATE * UPDATES
    axes.axhline(1 / CUES, color="black", linewidth=1.2, linestyle=(0, (1, 2)))
    axes.text(last * 1.015, 1 / CUES, f"chance, {1 / CUES}", va="center")
    rows = read_rows(source)
    for arm, style in STYLES.items():
        curves: dict[str, dict[int, float]] = defaultdict(dict)
        for row in rows:
            if row["arm"] == arm:
                curves[row["seed"]][int(row["steps"])] = float(row["success"])
        for curve in curves.values():
            axes.plot(list(curve), list(curve.values()), color=style.colour, linewidth=1, alpha=0.5)
        steps = sorted(set().union(*curves.values()))
        means = [float(np.mean([curve[step] for curve in curves.values() if step in curve])) for step in steps]
        axes.plot(steps, means, color=style.colour, linewidth=2.8, marker=style.marker, markersize=6)
        axes.text(*style.position, style.label, color=style.colour, fontweight="bold", va="center")
    axes.set(xlim=(0, last * 1.01), ylim=(0, 1.03))
    axes.set_xlabel("environment steps")
    axes.set_ylabel("greedy success\n(share of right answers)")
    axes.set_title(f"Remember one of {CUES} cues for {HORIZON:,} steps, then name it", loc="left", fontsize=13)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=200)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="train, and append the points to a CSV file")
    runs.add_argument("--arms", nargs="+", choices=ARMS, default=list(STYLES), help="default: %(default)s")
    runs.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: %(default)s")
    runs.add_argument("--output", type=Path, default=Path("benchmarks/results/hero.csv"), help="default: %(default)s")
    draws = commands.add_parser("draw", help="draw the figure from the CSV file alone")
    draws.add_argument("--input", type=Path, default=Path("benchmarks/results/hero.csv"), help="default: %(default)s")
    draws.add_argument("--output", type=Path, default=Path("docs/figures/hero.png"), help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run or draw."""
    arguments = parse_arguments(argv)
    if arguments.command == "run":
        run(arguments.arms, arguments.seeds, arguments.output)
    else:
        draw(arguments.input, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
