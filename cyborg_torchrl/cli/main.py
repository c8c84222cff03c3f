"""The command `cyborg-torchrl`, which is also `python -m cyborg_torchrl`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

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
EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print("error: name a command (see cyborg-torchrl --help)", file=sys.stderr)
        return EXIT_BAD_INPUT
    name = arguments.pop(0)
    if name in ("-h", "--help"):
        print(_help())
        return 0
    try:
        # The imports take seconds, so they happen here: Ctrl-C ends them without a traceback.
        from cyborg_torchrl.registry import did_you_mean
        from cyborg_torchrl.training.command import UsageError, exit_code_of

        def run() -> int:
            if name not in COMMANDS:
                raise UsageError(f"unknown command '{name}': {did_you_mean(name, COMMANDS)}")
            return importlib.import_module(f"cyborg_torchrl.cli.{name}").main(arguments)

        return exit_code_of(run)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _help() -> str:
    lines = [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    return "\n".join([
        "usage: cyborg-torchrl COMMAND ...",
        "",
        *lines,
        "",
        "cyborg-torchrl COMMAND --help shows the options of a command, with an example.",
    ])  # fmt: skip
