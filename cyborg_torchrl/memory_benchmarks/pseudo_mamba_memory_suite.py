r"""Trains and evaluates one agent on one memory task.

python -m cyborg_torchrl.memory_benchmarks.pseudo_mamba_memory_suite \
    --task delayed_cue --backbone lru --horizon 1000 --num-envs 64 --total-timesteps 200000 --device cpu

The last line of stdout is the summary as one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cyborg_torchrl.cli import overrides_parser, run_command
from cyborg_torchrl.memory_benchmarks.arguments import task_overrides

FLAGS = {
    "backbone": "backbone",
    "level": "env.level",
    "horizon": "env.horizon",
    "num_envs": "env.num_envs",
    "total_timesteps": "train.total_timesteps",
    "device": "train.device",
    "seed": "train.seed",
    "run_name": "logger.run_name",
    "base_dir": "logger.base_dir",
    "eval_episodes": "logger.eval_episodes",
}
"""Flags, and the configuration keys that they set."""


def build_parser() -> argparse.ArgumentParser:
    """The suite's parser."""
    parser = overrides_parser(__doc__, "memory_delayed_cue_recurrent")
    parser.add_argument("--task", help="environment (delayed_cue); those of other packages with their id: popgym:ID")
    parser.add_argument("--backbone", help="memory: lru, gru, lstm, mamba, mamba_gru, ..., or one of yours")
    parser.add_argument("--level", help="difficulty of a memory task: easy, medium, hard or extreme")
    parser.add_argument("--horizon", type=int, help="blank steps between cue and query")
    parser.add_argument("--num-envs", type=int, help="environments side by side")
    parser.add_argument("--total-timesteps", type=int, help="environment steps in all")
    parser.add_argument("--device", help="cpu, cuda, cuda:N or auto (CUDA where it is)")
    parser.add_argument("--seed", type=int, help="seed of parameters, actions and environments")
    parser.add_argument("--run-name", help="folder of the run")
    parser.add_argument("--base-dir", help="folder of all runs")
    parser.add_argument("--eval-episodes", type=int, help="fresh episodes after training")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite. Returns the exit code: 0, 2 for bad input, 130 if interrupted."""
    arguments = build_parser().parse_intermixed_args(argv)
    given = ((key, getattr(arguments, flag)) for flag, key in FLAGS.items())
    overrides = [f"{key}={value}" for key, value in given if value is not None]
    if arguments.task is not None:
        overrides = [*task_overrides(arguments.task), *overrides]
    return run_command(arguments.config, [*overrides, *arguments.overrides], is_print_only=arguments.print_config)


if __name__ == "__main__":
    sys.exit(main())
