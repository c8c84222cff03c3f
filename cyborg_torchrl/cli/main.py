"""The command `cyborg-torchrl`, which is also `python -m cyborg_torchrl`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from cyborg_torchrl.registry import did_you_mean
from cyborg_torchrl.training.command import UsageError, exit_code_of

COMMANDS = {
    "train": "train an agent",
    "sweep": "train all combinations of several values, and print a table",
    "evaluate": "play fresh episodes with a trained agent, with confidence intervals",
    "play": "show episodes of a trained agent, as a film or as text",
    "export": "write a trained agent as an ONNX or torch.export file",
    "check": "check that a recurrent policy is trained on the states it acted with",
    "report": "write one HTML page about many runs",
    "replay": "look into the dump of a run that stopped at NaN",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        if not arguments:
            raise UsageError("name a command (see cyborg-torchrl --help)")
        name = arguments.pop(0)
        if name in ("-h", "--help"):
            print(_help())
            return 0
        if name not in COMMANDS:
            raise UsageError(f"unknown command '{name}': {did_you_mean(name, COMMANDS)}")
        if os.getcwd() not in sys.path:  # as with `python -m`, for modules that an option names
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(f"cyborg_torchrl.cli.{name}").main(arguments)

    return exit_code_of(run)


def _help() -> str:
    commands = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    hint = "cyborg-torchrl COMMAND --help shows the options of a command, with an example."
    return f"usage: cyborg-torchrl COMMAND ...\n\n{commands}\n\n{hint}"
