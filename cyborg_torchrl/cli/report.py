"""Write one HTML page about runs: learning curves, results, speed, the memory of one agent, and a list of the runs.

    cyborg-torchrl report runs/sweep --output report.html
    cyborg-torchrl report runs/a runs/b runs/sweep --xray runs/a

Give run folders, and folders above some, such as a sweep's, in any mix. The page needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cyborg_torchrl.collectors.runtime import prepare_cpu
from cyborg_torchrl.registry import UnavailableError
from cyborg_torchrl.training.command import CommandParser, UsageError, writable

EXTRA = "the report needs more packages: pip install 'cyborg-torchrl[report]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page. Return the exit code."""
    arguments = _parser().parse(argv)
    try:
        from cyborg_torchrl.memory_benchmarks.report.page import build_page
        from cyborg_torchrl.memory_benchmarks.report.runs import ReportError, find_runs
        from cyborg_torchrl.memory_benchmarks.report.xray import XRay, look
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{EXTRA} ({error.name} is missing)") from None
    prepare_cpu(1)
    try:
        with Console(stderr=True).status("reading runs") as status:
            runs = find_runs(arguments.runs)
            xray: XRay | str = "No agent was looked into (--no-xray)."
            if not arguments.no_xray:
                xray = look(runs, arguments.xray, lambda step: status.update(f"looking into a memory: {step}"))
            status.update(f"drawing {len(runs)} runs")
            arguments.output.write_text(build_page(runs, xray), encoding="utf-8")
    except ReportError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"--output: cannot write '{arguments.output}' ({error.strerror}).") from None
    finished = sum(run.status == "finished" for run in runs)
    size = arguments.output.stat().st_size / 1e6
    print(f"{arguments.output}: {len(runs)} runs, {finished} of them finished, {size:.1f} MB")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="cyborg-torchrl report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_OR_SWEEP", help="a run's folder, or one above some")
    parser.add_argument("--output", type=writable, default=Path("report.html"), help="page to write (%(default)s)")
    xray = parser.add_mutually_exclusive_group()
    xray.add_argument("--xray", type=Path, metavar="RUN", help="run whose memory to look into (the best finished one)")
    xray.add_argument("--no-xray", action="store_true", help="load no checkpoint")
    return parser
