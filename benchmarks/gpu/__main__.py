"""Run every GPU test and measurement in at most nine minutes, on one H100 or H200.

python -m benchmarks.gpu
python -m benchmarks.gpu --parts tests exact --minutes 3 --output gpu_run.json

The tables of an earlier run, and a test of the command without a GPU:

python -m benchmarks.gpu --markdown gpu_run.json
python -m benchmarks.gpu --device cpu --smoke --output smoke.json

Each part is a process with a time limit. What a part leaves of its time goes to the next ones. The JSON file is written
after each result, so a run that is stopped keeps its results. The exit code is 1 if a part failed or two results
differ that should be equal bit by bit, and 2 without a GPU.

tests: pytest -m gpu. exact: steps and sequences, repeated runs, resumed runs, runs without graphs. sequences, large,
cores: forward and backward passes, compared with cuDNN, TorchRL and mamba-ssm. default_runs, many_environments,
mission: training. minibatch: launches and waits of an optimiser step. kernels: each kernel alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import machine
from benchmarks.gpu.part import PARTS
from benchmarks.gpu.table import markdown
from benchmarks.gpu.timing import Row
from cyborg_torchrl.training.command import EXIT_INTERRUPTED, positive, writable
from cyborg_torchrl.training.experiment import terminations_as_interrupt

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "benchmarks" / "results" / "gpu_run.json"
PACKAGES = ("torch", "triton", "torchrl", "tensordict", "mamba-ssm", "numpy")
MARGIN = 5.0
"""Seconds that are left for stopping a part and for the tables."""
LOG = 4000
"""Last characters of stderr that are kept when a part fails."""
Record = dict[str, Any]


def run_part(name: str, options: Sequence[str], seconds: float, on_row: Callable[[Row], None]) -> Record:
    """Run a part in a process. Return its seconds, and its error if it failed.

    Args:
        name: name of the part.
        options: arguments of `benchmarks.gpu.part` after the name.
        seconds: the part is stopped after this time.
        on_row: called with each result.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.part", name, *options]
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        ) as process,
    ):
        timer = threading.Timer(seconds, _kill, [process])
        timer.start()
        try:
            for line in process.stdout or ():
                if line.endswith("\n"):  # not a line that was cut when the part was stopped
                    on_row(json.loads(line))
            code = process.wait()
        finally:
            timer.cancel()
            _kill(process)
        errors.seek(0)
        log = errors.read()[-LOG:]
    elapsed = time.perf_counter() - started
    record: Record = {"seconds": round(elapsed, 1), "limit": round(seconds, 1)}
    if code:
        last = (log.strip().splitlines() or [f"exit code {code}"])[-1]
        is_stopped = code == -signal.SIGKILL and elapsed >= seconds
        record |= {"error": f"stopped after {seconds:.0f} s" if is_stopped else last, "log": log}
    return record


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process with all that it has started, such as hanging tests."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_parts(arguments: argparse.Namespace) -> tuple[Record, bool]:
    """Run the parts one after another. Return the results, and whether the run was interrupted."""
    results: Record = {
        "machine": machine(PACKAGES),
        "recorded": date.today().isoformat(),
        "commit": _commit(),
        "device": arguments.device,
        "is_smoke": arguments.smoke,
        "parts": {},
    }
    options = ["--device", arguments.device, *(["--smoke"] if arguments.smoke else [])]
    available = 60.0 * arguments.minutes - MARGIN
    end = time.perf_counter() + available
    total = sum(PARTS[name].seconds for name in arguments.parts)
    shares = {name: available * PARTS[name].seconds / total for name in arguments.parts}
    for index, name in enumerate(arguments.parts):
        part: Record = {"rows": []}
        results["parts"][name] = part
        later = sum(shares[other] for other in arguments.parts[index + 1 :])

        def on_row(row: Row, name: str = name, part: Record = part) -> None:
            part["rows"].append(row)
            print(f"{name}: {_in_a_line(row)}", flush=True)
            write(arguments.output, results)

        try:
            part |= run_part(name, options, end - time.perf_counter() - later, on_row)
        except KeyboardInterrupt:
            part["error"] = "interrupted"
            return results, True
        finally:
            write(arguments.output, results)
        print(f"{name}: {part.get('error', 'finished')}, {part['seconds']:.0f} s", flush=True)
    return results, False


def write(path: Path, results: Record) -> None:
    """Write the results. The file is complete at every moment."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(path)


def has_failed(results: Record) -> bool:
    """Return whether a part failed, or two results differ that should be equal."""
    parts = results["parts"].values()
    rows = [row for part in parts for row in part["rows"]]
    return any("error" in each for each in (*parts, *rows)) or not all(row.get("is_equal", True) for row in rows)


def _in_a_line(row: Row) -> str:
    values = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
    return ", ".join(f"{key} {value}" for key, value in values.items() if key != "arguments")


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)} (all)")  # fmt: skip
    parser.add_argument("--minutes", type=positive, default=9, help="time for all parts together (%(default)s)")
    parser.add_argument("--output", type=writable, default=OUTPUT, help="JSON file for all results (%(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="FILE.json", help="print the tables of this file, run nothing")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu only with --smoke (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to test the command")
    arguments = parser.parse_args(argv)
    if arguments.markdown:
        try:
            print(markdown(json.loads(arguments.markdown.read_text())))
        except (OSError, ValueError, KeyError) as error:
            print(f"error: cannot read {arguments.markdown}: {error}", file=sys.stderr)
            return 2
        return 0
    if arguments.device == "cpu" and not arguments.smoke:
        print("error: --device cpu measures nothing; use it with --smoke", file=sys.stderr)
        return 2
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: this needs a CUDA GPU; --device cpu --smoke tests the command without one", file=sys.stderr)
        return 2
    with terminations_as_interrupt():
        results, is_interrupted = run_parts(arguments)
    print(f"\n{markdown(results)}")
    if is_interrupted:
        return EXIT_INTERRUPTED
    return int(has_failed(results))


if __name__ == "__main__":
    sys.exit(main())
