"""Run a configuration as a command: errors in one line, exit codes, the summary as the last line of stdout."""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf

from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.config.imports import as_overrides, import_components
from cyborg_torchrl.envs.gym.failures import failed_place
from cyborg_torchrl.registry import UnavailableError, did_you_mean
from cyborg_torchrl.training.builders import prepare_process
from cyborg_torchrl.training.checkpoint import CheckpointError
from cyborg_torchrl.training.distributed import launched_rank
from cyborg_torchrl.training.experiment import StoppedError, run_experiment
from cyborg_torchrl.training.resume import with_config_of_run

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141
"""The reader of stdout has gone, as `head` does after some lines; shells report 128 + SIGPIPE."""
RANK_DELAY = 20.0
"""Seconds within which a launcher ends all processes after the first one has failed."""
OVERRIDES_HELP = """\
overrides: key=value, as in backbone=gru env.horizon=200 train.seed=3 train.learning_rate=1e-3
  a public benchmark by its id: env=popgym id=popgym-RepeatFirstEasy-v0 (id is short for env.id)
  resume=auto or resume=runs/NAME continues a run (resume is short for logger.resume)
  --print-config prints every key with its value"""


class UsageError(ValueError):
    """Arguments that a command cannot use; the message is one line."""


KNOWN_ERRORS = (CheckpointError, ConfigError, StoppedError, UnavailableError, UsageError)
"""Errors whose message is enough: a command prints it in one line, without a traceback."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError`, and shows descriptions as they are written."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        text = "module or .py file that registers environments and backbones; may be repeated"
        self.add_argument("--import", action="append", default=[], dest="imports", metavar="MODULE", help=text)

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`; for an unknown option with the nearest known one."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if unknown != message.split()[0] and unknown.startswith("-"):
            message = f"{message}: {did_you_mean(unknown.partition('=')[0], self._option_string_actions)}"
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Return the parsed arguments, and import the modules of --import. Overrides may come between options.

        Raises:
            UsageError: for arguments that cannot be used.
            ConfigError: if a module cannot be imported.
        """
        arguments = self.parse_intermixed_args(argv)
        for override in getattr(arguments, "overrides", ()):
            if "=" not in override and not override.startswith("~"):
                self.error(f"cannot read '{override}': overrides look like key=value")
        import_components(arguments.imports)
        if "config" in arguments:  # a new configuration, which records its modules
            arguments.overrides = [*arguments.overrides, *as_overrides(arguments.imports)]
        return arguments


def config_parser(description: str | None, default_config: str, prog: str | None = None) -> CommandParser:
    """Return a parser with --config, --print-config and key=value overrides."""
    parser = CommandParser(prog=prog, description=description, epilog=OVERRIDES_HELP)
    parser.add_argument("--config", default=default_config, help="shipped configuration, or a YAML file (%(default)s)")
    parser.add_argument("--print-config", action="store_true", help="print the composed configuration and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    return parser


def positive(text: str) -> int:
    """Return an integer of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more; got '{text}'")
    return value


def writable(text: str, endings: Sequence[str] = ()) -> Path:
    """Return the path of a file in a folder that exists, with one of the endings if there are any."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"'{path}' is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder '{path.parent}'")
    if endings and path.suffix not in endings:
        raise argparse.ArgumentTypeError(f"must end in {' or '.join(endings)}; got '{text}'")
    return path


picture = partial(writable, endings=(".png", ".svg", ".pdf"))
"""Return the path of a picture, of a kind that can be written, in a folder that exists."""


def main(argv: Sequence[str] | None = None, *, description: str | None = None, default_config: str) -> int:
    """Run the command of an example: --config, --print-config and overrides. Return the exit code."""

    def run() -> int:
        arguments = config_parser(description, default_config).parse(argv)
        return run_command(arguments.config, arguments.overrides, is_print_only=arguments.print_config)

    return exit_code_of(run)


def run_command(config: str, overrides: Sequence[str], *, is_print_only: bool = False) -> int:
    """Compose a configuration, train, and print the summary as one JSON object. Return the exit code."""

    def run() -> int:
        cfg = with_config_of_run(load_config(config, overrides), list(overrides))
        if is_print_only:
            print(OmegaConf.to_yaml(cfg), end="")
            return 0
        prepare_process(cfg)
        summary = run_experiment(cfg)
        if not launched_rank():
            print(json.dumps(summary))
        return EXIT_INTERRUPTED if summary["is_interrupted"] else 0

    return exit_code_of(run, interrupted="interrupted before training began")


def exit_code_of(run: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """Run a command with known errors and Ctrl-C reported in one line.

    Args:
        run: runs the command and returns its exit code.
        interrupted: the line that Ctrl-C prints.

    Returns:
        The exit code: 2 for bad input, 1 for a run that stopped, 130 for Ctrl-C, 141 if stdout has no reader.
    """
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    try:
        code = run()
        sys.stdout.flush()
    except KNOWN_ERRORS as error:
        return _report_error(error)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if _has_reader():  # another pipe is broken
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        return EXIT_NO_READER
    except Exception as error:
        place = failed_place(error)
        if place is not None:  # before the traceback, which may be long, and not after it again
            print(f"error: {place}", file=sys.stderr)
            error.__notes__.remove(place)
        raise
    return code


def _report_error(error: Exception) -> int:
    has_stopped = isinstance(error, StoppedError)
    rank = launched_rank()
    if rank and not has_stopped:  # bad input fails in all processes, and the first one reports it
        time.sleep(RANK_DELAY)
    prefix = f"process {rank}: " if rank else ""
    print(f"{prefix}error: {error}", file=sys.stderr)
    return EXIT_FAILED if has_stopped else EXIT_BAD_INPUT


def _has_reader() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return not any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on this system, or stdout is not a file
        return True
