"""`python -m cyborg_torchrl COMMAND`: the commands for trained agents."""

from __future__ import annotations

import argparse
import importlib
import logging
import pkgutil
import sys
from collections.abc import Sequence

from cyborg_torchrl import commands
from cyborg_torchrl.cli import EXIT_INTERRUPTED, KNOWN_ERRORS, report_error, unless_unread


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="cyborg_torchrl", description="Commands for trained agents.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in sorted(module.name for module in pkgutil.iter_modules(commands.__path__)):
        # each has a docstring, `add_arguments` and `run`
        command = importlib.import_module(f"{commands.__name__}.{name}")
        text = command.__doc__ or ""
        child = subparsers.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_arguments(child)
        child.set_defaults(run=command.run)
    arguments, rest = parser.parse_known_args(argv)
    if any(text.startswith("-") or "=" not in text for text in rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # key=value after an option, which argparse does not take for a positional argument
        arguments.overrides = [*arguments.overrides, *rest]
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    try:
        return unless_unread(lambda: arguments.run(arguments))
    except KNOWN_ERRORS as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
