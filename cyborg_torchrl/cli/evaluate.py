"""Plays fresh episodes with a trained agent, and says how sure the result is.

    python -m cyborg_torchrl evaluate runs/my-run --episodes 1000
    python -m cyborg_torchrl evaluate runs/my-run/checkpoints/best.pt env.horizon=2000 --seed 7

It acts twice: by the likeliest actions (greedy), and by actions drawn from the policy as while training (sampled).
Intervals are those of 95 % confidence: Wilson's for success, Student's for returns. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from cyborg_torchrl.build import prepare_process
from cyborg_torchrl.cli import add_checkpoint_arguments, overrides_of
from cyborg_torchrl.confidence import Interval, mean_interval, success_interval
from cyborg_torchrl.evaluation import Evaluation
from cyborg_torchrl.experiment import evaluate_agent
from cyborg_torchrl.memory_benchmarks.arguments import positive
from cyborg_torchrl.progress import progress_bar
from cyborg_torchrl.restore import load_agent

MODES = {"greedy": True, "sampled": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--episodes", type=positive, default=1000, help="episodes of each kind, at least (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")


def run(arguments: argparse.Namespace) -> int:
    """Evaluates and prints. Returns the exit code."""
    started = time.perf_counter()
    cfg, agent, _ = load_agent(arguments.checkpoint, overrides_of(arguments))
    results: dict[str, Any] = {}
    for mode, is_deterministic in MODES.items():
        prepare_process(cfg)  # each begins with the same random numbers
        with progress_bar(f"{mode} episodes", arguments.episodes) as show:
            result = evaluate_agent(
                cfg,
                agent,
                arguments.episodes,
                is_deterministic=is_deterministic,
                on_episodes=lambda finished, total: show(finished),
            )
        results[mode] = summary(result)
        if not arguments.json:
            print(_line(mode, results[mode]))
    about = {"checkpoint": arguments.checkpoint, "overrides": arguments.overrides, "seed": cfg.train.seed}
    print(json.dumps({**about, **results, "seconds": round(time.perf_counter() - started, 2)}))
    return 0


def summary(result: Evaluation) -> dict[str, Any]:
    """The figures of an evaluation with their intervals; None where there is no success, or a single episode."""
    successes = result.successes
    return {
        "episodes": result.episodes,
        "success_rate": result.success_rate,
        "success_rate_ci95": None if successes is None else success_interval(successes),
        "mean_reward": result.mean_reward,
        "mean_reward_ci95": mean_interval(result.returns),
        "mean_length": float(result.lengths.double().mean()),
    }


def _line(mode: str, figures: dict[str, Any]) -> str:
    parts = [f"{mode:<8} {figures['episodes']:>6} episodes"]
    if figures["success_rate"] is not None:
        parts.append(f"success {figures['success_rate']:.3f} {_between(figures['success_rate_ci95'])}")
    parts.append(f"return {figures['mean_reward']:.3f} {_between(figures['mean_reward_ci95'])}")
    return "  ".join([*parts, f"length {figures['mean_length']:.1f}"])


def _between(interval: Interval | None) -> str:
    return "[?]" if interval is None else f"[{interval.low:.3f}, {interval.high:.3f}]"
