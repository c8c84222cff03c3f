"""Play fresh episodes with a trained agent, and print success and return with confidence intervals.

    cyborg-torchrl evaluate runs/my-run --episodes 1000
    cyborg-torchrl evaluate runs/my-run/checkpoints/best.pt env.horizon=2000 --seed 7

The agent acts twice: with the likeliest actions (greedy), and with actions drawn as in training (sampled).
Intervals have 95 % confidence: Wilson's for success, Student's for returns. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from cyborg_torchrl.cli.arguments import agent_of, checkpoint_parser
from cyborg_torchrl.training.command import positive
from cyborg_torchrl.training.evaluation import Evaluation
from cyborg_torchrl.training.progress import progress_bar
from cyborg_torchrl.training.run_evaluation import evaluate_agent
from cyborg_torchrl.training.stats import Interval, mean_interval, success_interval

MODES = {"greedy": True, "sampled": False}


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and print. Return the exit code."""
    parser = checkpoint_parser("evaluate", __doc__)
    parser.add_argument("--episodes", type=positive, default=1000, help="episodes of each kind, at least (%(default)s)")
    parser.add_argument(
        "--max-steps", type=positive, help="episodes are cut after these (the environment's limit, at least 10,000)"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    arguments = parser.parse(argv)
    started = time.perf_counter()
    max_steps = [] if arguments.max_steps is None else [f"logger.eval_max_steps={arguments.max_steps}"]
    cfg, agent = agent_of(arguments, *max_steps)
    results: dict[str, Any] = {}
    for mode, is_deterministic in MODES.items():
        torch.manual_seed(cfg.train.seed)  # both modes begin with the same random numbers
        with progress_bar(f"{mode} episodes", arguments.episodes) as show:
            result = evaluate_agent(
                cfg,
                agent,
                arguments.episodes,
                is_deterministic=is_deterministic,
                on_episodes=lambda finished, total: show(finished),
            )
        results[mode] = summary(result)
        if result.num_cut:
            print(f"warning: {mode}: {result.cut_note}", file=sys.stderr)
        if not arguments.json:
            print(_line(mode, results[mode]))
    about = {"checkpoint": arguments.checkpoint, "overrides": arguments.overrides, "seed": cfg.train.seed}
    print(json.dumps({**about, **results, "seconds": round(time.perf_counter() - started, 2)}))
    return 0


def summary(result: Evaluation) -> dict[str, Any]:
    """Return the metrics of an evaluation with their intervals; None without success, or for a single episode."""
    successes = result.successes
    return {
        "episodes": result.episodes,
        "cut_episodes": result.num_cut,
        "success_rate": result.success_rate,
        "success_rate_ci95": None if successes is None else success_interval(successes),
        "mean_reward": result.mean_reward,
        "mean_reward_ci95": mean_interval(result.returns),
        "mean_length": float(result.lengths.double().mean()),
    }


def _line(mode: str, metrics: dict[str, Any]) -> str:
    parts = [f"{mode:<8} {metrics['episodes']:>6} episodes"]
    if metrics["success_rate"] is not None:
        parts.append(f"success {metrics['success_rate']:.3f} {_between(metrics['success_rate_ci95'])}")
    parts.append(f"return {metrics['mean_reward']:.3f} {_between(metrics['mean_reward_ci95'])}")
    return "  ".join([*parts, f"length {metrics['mean_length']:.1f}"])


def _between(interval: Interval | None) -> str:
    return "[?]" if interval is None else f"[{interval.low:.3f}, {interval.high:.3f}]"
