"""Writes one HTML page about runs: learning curves, results, speed, the memory of one agent, and what was run.

python -m cyborg_torchrl.memory_benchmarks.report runs/sweep --output report.html
python -m cyborg_torchrl.memory_benchmarks.report runs/a runs/b runs/sweep --xray runs/a

It takes run folders and folders of runs, such as a sweep's base folder, in any mix. The page needs no network.
Exit code: 0, or 2 for input that there can be no report of.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cyborg_torchrl.checkpoint import CheckpointError
from cyborg_torchrl.config import ConfigError
from cyborg_torchrl.memory_benchmarks.arguments import writable
from cyborg_torchrl.process import prepare_cpu
from cyborg_torchrl.registry import UnavailableError

EXTRA = "the report needs more packages: pip install 'cyborg-torchrl[report]'"
EXIT_BAD_INPUT = 2


def build_parser() -> argparse.ArgumentParser:
    """The report's parser."""
    parser = argparse.ArgumentParser(
        prog="report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_OR_SWEEP", help="a run's folder, or one above some")
    parser.add_argument("--output", type=writable, default=Path("report.html"), help="page to write (%(default)s)")
    looked = parser.add_mutually_exclusive_group()
    looked.add_argument(
        "--xray", type=Path, metavar="RUN", help="run whose memory is looked into (a finished one of the best score)"
    )
    looked.add_argument("--no-xray", action="store_true", help="look into none: no checkpoint is loaded")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page. Returns the exit code."""
    arguments = build_parser().parse_args(argv)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    try:
        from cyborg_torchrl.memory_benchmarks.report.failures import with_failures
        from cyborg_torchrl.memory_benchmarks.report.page import build_page
        from cyborg_torchrl.memory_benchmarks.report.runs import ReportError, find_runs
        from cyborg_torchrl.memory_benchmarks.report.xray import XRay, look
    except ModuleNotFoundError as error:
        print(f"error: {EXTRA} ({error.name} is missing)", file=sys.stderr)
        return EXIT_BAD_INPUT
    prepare_cpu(1)
    try:
        with Console(stderr=True).status("reading runs") as status:
            runs = with_failures(find_runs(arguments.runs), arguments.runs)
            xray: XRay | str = "No agent was looked into (--no-xray)."
            if not arguments.no_xray:
                xray = look(runs, arguments.xray, lambda what: status.update(f"looking into a memory: {what}"))
            status.update(f"drawing {len(runs)} runs")
            arguments.output.write_text(build_page(runs, xray), encoding="utf-8")
    except (ReportError, CheckpointError, ConfigError, UnavailableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        print(f"error: --output: cannot write '{arguments.output}' ({error.strerror}).", file=sys.stderr)
        return EXIT_BAD_INPUT
    finished = sum(run.status == "finished" for run in runs)
    size = arguments.output.stat().st_size / 1e6
    print(f"{arguments.output}: {len(runs)} runs, {finished} of them finished, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
