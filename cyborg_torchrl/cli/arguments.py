"""Arguments that several commands have: a checkpoint, and changes to its configuration."""

from __future__ import annotations

import argparse

from cyborg_torchrl.training.command import CommandParser


def checkpoint_parser(command: str, description: str | None) -> CommandParser:
    """Return a parser for a checkpoint, overrides and --seed, which `overrides_of` reads."""
    parser = CommandParser(prog=f"cyborg-torchrl {command}", description=description)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, or a file in its 'checkpoints'")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes, as in env.horizon=2000")
    parser.add_argument("--seed", type=int, help="seed of episodes and samples (the run's)")
    return parser


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """Return the changes to the checkpoint's configuration, with the seed."""
    seed = [] if arguments.seed is None else [f"train.seed={arguments.seed}"]
    return [*arguments.overrides, *seed]
