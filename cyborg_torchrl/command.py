"""What the commands share: one clear line and exit code 2 for wrong input, the summary as the last line of stdout."""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from cyborg_torchrl.checkpoint import CheckpointError
from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.distributed import launched_rank
from cyborg_torchrl.experiment import StoppedError, run_experiment
from cyborg_torchrl.registry import UnavailableError
from cyborg_torchrl.resumption import with_config_of_run

EXIT_STOPPED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141
"""Whoever read the output has left, as `head` does; what a shell says of programs that end of it (128 + SIGPIPE)."""
KNOWN_ERRORS = (CheckpointError, ConfigError, StoppedError, UnavailableError)
"""What is said in one line."""
GRACE = 20.0
"""Seconds in which a launcher ends all processes because the first one has failed."""


def overrides_parser(description: str | None, default_config: str) -> argparse.ArgumentParser:
    """A parser with --config and key=value overrides."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="overrides: key=value, as in backbone=gru env.horizon=200 train.seed=3 train.learning_rate=1e-3; "
        "a public benchmark by its id: env=popgym id=popgym-RepeatFirstEasy-v0 (id=... is short for env.id=...); "
        "resume=auto or resume=runs/NAME goes on with a run; "
        "the keys with their defaults are in configs/ and printed by --print-config.",
    )
    parser.add_argument("--config", default=default_config, help="shipped configuration, or a YAML file (%(default)s)")
    parser.add_argument("--print-config", action="store_true", help="print the composed configuration and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    return parser


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """A checkpoint and changes to its configuration, which `overrides_of` reads."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, or a file in its 'checkpoints'")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes, as in env.horizon=2000")
    parser.add_argument("--seed", type=int, help="seed of episodes and samples (that of the run)")


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """The changes to the configuration that were asked for, the seed's among them."""
    return [*arguments.overrides, *([] if arguments.seed is None else [f"train.seed={arguments.seed}"])]


def _has_no_reader() -> bool:
    """Whether nobody reads stdout any more."""
    try:
        look = select.poll()
        look.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in look.poll(0))
    except (AttributeError, OSError, ValueError):  # there is no poll here, or stdout is no file
        return False


def unless_unread(run: Callable[[], int]) -> int:
    """The exit code of a command; `EXIT_UNREAD`, and no traceback, if its output is no longer read."""
    try:
        code = run()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _has_no_reader():  # some other pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at the end goes nowhere
        return EXIT_UNREAD
    return code


def run_command(config: str, overrides: Sequence[str], *, is_print_only: bool = False) -> int:
    """Composes a configuration, trains, and prints the summary as one JSON object. Returns the exit code."""
    return unless_unread(lambda: _run_command(config, overrides, is_print_only))


def _run_command(config: str, overrides: Sequence[str], is_print_only: bool) -> int:
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    try:
        cfg = with_config_of_run(load_config(config, overrides), list(overrides))
        if is_print_only:
            from omegaconf import OmegaConf

            print(OmegaConf.to_yaml(cfg), end="")
            return 0
        summary = run_experiment(cfg)
    except KNOWN_ERRORS as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("interrupted before training began", file=sys.stderr)
        return EXIT_INTERRUPTED
    return report_summary(summary)


def report_error(error: Exception) -> int:
    """Says in one line on stderr what ended a command. Returns the exit code."""
    is_of_this_process = isinstance(error, StoppedError)
    rank = launched_rank()
    if rank and not is_of_this_process:  # what is wrong for the first is wrong for all, and it ends them
        time.sleep(GRACE)
    print(f"{f'process {rank}: ' if rank else ''}error: {error}", file=sys.stderr)
    return EXIT_STOPPED if is_of_this_process else EXIT_BAD_INPUT


def report_summary(summary: dict[str, Any]) -> int:
    """Prints the summary of a run as one JSON object, from the first process. Returns the exit code."""
    if not launched_rank():
        print(json.dumps(summary))
    return EXIT_INTERRUPTED if summary["is_interrupted"] else 0


def main(argv: Sequence[str] | None = None, *, description: str | None = None, default_config: str) -> int:
    """The command of an example: --config, --print-config and overrides. Returns the exit code."""
    arguments = overrides_parser(description, default_config).parse_intermixed_args(argv)
    return run_command(arguments.config, arguments.overrides, is_print_only=arguments.print_config)
