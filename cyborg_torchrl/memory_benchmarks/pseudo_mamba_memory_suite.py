r"""Train and evaluate one agent on one memory task.

python -m cyborg_torchrl.memory_benchmarks.pseudo_mamba_memory_suite \
    --task delayed_cue --backbone lru --horizon 1000 --num-envs 64 --total-timesteps 200000 --device cpu

The last line of stdout is the summary as one JSON object.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyborg_torchrl.training.command import CommandParser, config_parser, exit_code_of, run_command

FLAGS = {
    "level": ("env.level", str, "difficulty of a memory task: easy, medium, hard or extreme"),
    "backbone": ("backbone", str, "memory: lru, gru, lstm, mamba, mamba_gru, ..., or one of yours"),
    "horizon": ("env.horizon", int, "blank steps between cue and query"),
    "num_envs": ("env.num_envs", int, "environments that run together"),
    "total_timesteps": ("train.total_timesteps", int, "environment steps in all"),
    "device": ("train.device", str, "cpu, cuda, cuda:N, or auto (CUDA if there is one)"),
    "seed": ("train.seed", int, "seed of parameters, actions and environments"),
    "run_name": ("logger.run_name", str, "folder of the run"),
    "base_dir": ("logger.base_dir", str, "folder of all runs"),
    "eval_episodes": ("logger.eval_episodes", int, "fresh episodes after training"),
}
"""Flags: the configuration keys that they set, types and descriptions."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite. Return the exit code: 0, 1 if the run stopped, 2 for bad input, 130 if interrupted."""
    return exit_code_of(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    arguments = build_parser().parse(argv)
    overrides: list[str] = []
    if arguments.task is not None:
        name, has_id, identity = arguments.task.partition(":")
        overrides += [f"env={name}", *([f"env.id={identity}"] if has_id else [])]
    for flag, (key, _, _) in FLAGS.items():
        value = getattr(arguments, flag)
        if value is not None:
            overrides.append(f"{key}={value}")
    return run_command(arguments.config, [*overrides, *arguments.overrides], is_print_only=arguments.print_config)


def build_parser() -> CommandParser:
    """Return the suite's parser."""
    parser = config_parser(__doc__, "memory_delayed_cue_recurrent")
    parser.add_argument("--task", help="environment (delayed_cue); those of other packages with their id: popgym:ID")
    for flag, (_, kind, text) in FLAGS.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", type=kind, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
