"""Measure POPGym's environments: native batches against the package's environments, with random actions.

    python -m benchmarks.popgym_speed
    python -m benchmarks.popgym_speed --families RepeatFirst CountRecall --num-envs 256

One thread, in seconds of processor time. The three ways to step N environments take turns, and the
best of several rounds counts. Finished episodes are restarted at once.

- native: our environment, tensors in and tensors out.
- adapter: `build_popgym(native=False)`, the package behind the same interface.
- bare: the package's environments in a Python loop, without any tensor.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torchrl.envs import EnvBase

from cyborg_torchrl import keys
from cyborg_torchrl.envs import build_popgym
from cyborg_torchrl.envs.popgym.build import FAMILIES

Stepper = Callable[[], None]
"""Function that takes one step in every environment."""


def tensor_stepper(env: EnvBase) -> Stepper:
    """Return the stepper of an environment on tensors, as the collectors step it."""
    actions = cycle([env.action_spec.rand() for _ in range(1000)])
    env.restart()

    def step() -> None:
        done = env.advance(next(actions))[keys.DONE]
        if bool(done.any()):
            env.restart(done.squeeze(-1))

    return step


def bare_stepper(env_id: str, num_envs: int) -> Stepper:
    """Return the stepper of the package's environments in a loop."""
    import gymnasium

    envs = [gymnasium.make(env_id, disable_env_checker=True).unwrapped for _ in range(num_envs)]
    space = envs[0].action_space
    actions = cycle([[space.sample() for _ in envs] for _ in range(100)])
    for seed, env in enumerate(envs):
        env.reset(seed=seed)

    def step() -> None:
        for env, action in zip(envs, next(actions), strict=True):
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()

    return step


def seconds_per_step(steppers: dict[str, Stepper], rounds: int, seconds: float) -> dict[str, float]:
    """Return the seconds of one step of each stepper: the best of several rounds."""
    best = dict.fromkeys(steppers, float("inf"))
    for _ in range(rounds):
        for name, step in steppers.items():
            begun, count = time.process_time(), 0
            while (elapsed := time.process_time() - begun) < seconds or count < 3:
                step()
                count += 1
            best[name] = min(best[name], elapsed / count)
    return best


def measure(family: str, level: str, num_envs: int, rounds: int, seconds: float) -> dict[str, float]:
    """Return the seconds of a step of all environments, in each of the three ways."""
    env_id = f"popgym-{family}{level}-v0"
    shared: dict[str, Any] = {"id": env_id, "num_envs": num_envs, "seed": 0}
    steppers = {
        "native": tensor_stepper(build_popgym(**shared)),
        "adapter": tensor_stepper(build_popgym(**shared, native=False)),
        "bare": bare_stepper(env_id, num_envs),
    }
    with torch.no_grad():
        return seconds_per_step(steppers, rounds, seconds)


def main() -> None:
    """Print one line for each family, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=sorted(FAMILIES), default=sorted(FAMILIES), metavar="FAMILY")
    parser.add_argument("--level", default="Easy")
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each way in each round")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| family | native, steps/s | adapter, steps/s | bare, steps/s | native / adapter | native / bare |")
    print("|---|---|---|---|---|---|")
    ratios: list[tuple[float, float]] = []
    for family in args.families:
        try:
            step = measure(family, args.level, args.num_envs, args.rounds, args.seconds)
        except ValueError as error:
            print(f"| {family} | {error} | | | | |")
            continue
        ratios.append((step["adapter"] / step["native"], step["bare"] / step["native"]))
        rates = " | ".join(f"{args.num_envs / step[name]:,.0f}" for name in ("native", "adapter", "bare"))
        print(f"| {family} | {rates} | {ratios[-1][0]:.0f} | {ratios[-1][1]:.0f} |", flush=True)
    for name, function in (("median", statistics.median), ("least", min)):
        print(f"| {name} | | | | {' | '.join(f'{function(column):.0f}' for column in zip(*ratios, strict=True))} |")


if __name__ == "__main__":
    main()
