"""Train for a long time, and check memory, files, threads and processes.

python -m benchmarks.soak --minutes 30 --output soak.json
python -m benchmarks.soak --config public_benchmark env=gymnasium id=CartPole-v1 env.workers=2

The program samples another process from its first update on, and interrupts it at the end. The first tenth of the time
is a warm-up. After it, the exit code is 0 if all of this holds:

- Own memory was never 5 % above the median of the first half.
- The run had no more open files, threads or processes than before.
- Nothing was left afterwards: no process, no shared memory that a sample saw, no temporary file.

Own memory is resident memory without the pages of files, which the system may drop and reload. It may fall for a
moment, since protobuf, which writes TensorBoard's files, lets glibc return all freed memory. With glibc before 2.38 it
may rise again by a quarter. That is the allocator and no leak: then use LD_PRELOAD=libjemalloc.so.2.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence, Set
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cyborg_torchrl.training.command import EXIT_BAD_INPUT, EXIT_INTERRUPTED, positive, writable

PROGRAM = (
    "import sys; from cyborg_torchrl.training.command import run_command; "
    "sys.exit(run_command(sys.argv[1], sys.argv[2:]))"
)
MARKER = "CYBORG_TORCHRL_SOAK"
WARM_UP = 0.1
"""Share of the time in which a run may grow: buffers fill, threads and workers start."""
TOLERANCE = 0.05
"""Share by which own memory may exceed the median of its first half."""
SHARED_MEMORY = Path("/dev/shm")
Inode = tuple[int, int]
"""Device and number of a file."""
FOREVER = 10**15
SECONDS_TO_END = 60.0


class Sample(NamedTuple):
    """Resources of a run and its child processes."""

    seconds: float
    rss_mb: float
    """Resident memory."""
    own_mb: float
    """Resident memory without the pages of files."""
    files: int
    """Open files, including sockets and pipes."""
    threads: int
    processes: int


def sample_of(process: Any, began: float) -> Sample | None:
    """Return a sample of a `psutil.Process` and its children; None if one of them ended meanwhile."""
    import psutil

    try:
        tree = [process, *process.children(recursive=True)]
        memory = [each.memory_info() for each in tree]
        rss, shared = (sum(getattr(each, name) for each in memory) / 2**20 for name in ("rss", "shared"))
        files, threads = sum(each.num_fds() for each in tree), sum(each.num_threads() for each in tree)
    except psutil.Error:
        return None
    return Sample(time.monotonic() - began, rss, rss - shared, files, threads, len(tree))


def findings(samples: Sequence[Sample], minutes: float) -> dict[str, Any]:
    """Summarise the samples after the warm-up.

    Args:
        samples: samples in order of time.
        minutes: planned duration.

    Returns:
        For each resource the smallest, the largest, the first and the last value. Whether memory was flat. Whether any
        other resource has grown, which means that it never returns to an earlier value.
    """
    settled = [sample for sample in samples if sample.seconds > WARM_UP * minutes * 60]
    if len(settled) < 2:
        return {"is_flat": False, "grown": ["there are no samples: the run ended early"]}
    found: dict[str, Any] = {}
    for name in Sample._fields[1:]:
        values = [getattr(sample, name) for sample in settled]
        found[name] = {"smallest": min(values), "largest": max(values), "first": values[0], "last": values[-1]}
    half = len(settled) // 2
    for name in ("rss", "own"):
        usual = median(getattr(sample, f"{name}_mb") for sample in settled[:half])
        found[f"{name}_ratio"] = found[f"{name}_mb"]["largest"] / usual
    found["is_flat"] = found["own_ratio"] <= 1 + TOLERANCE
    found["grown"] = [
        name
        for name in ("files", "threads", "processes")
        if min(getattr(s, name) for s in settled[half:]) > max(getattr(s, name) for s in settled[:half])
    ]
    return found


def left_behind(marker: str) -> list[str]:
    """Return the command lines of processes of a run that still exist."""
    import psutil

    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == marker and process.status() != psutil.STATUS_ZOMBIE:
                left.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return left


def names_in(*folders: Path) -> set[str]:
    """Return the paths in folders."""
    return {str(path) for folder in folders if folder.is_dir() for path in folder.iterdir()}


def held_by(*pids: int) -> set[Inode]:
    """Return the files that processes have open or mapped.

    Files are identified by inode, since a semaphore is mapped before it gets its final name.
    """
    found: set[Inode] = set()
    for process in (Path("/proc") / str(pid) for pid in pids):
        with suppress(OSError):
            for line in (process / "maps").read_text().splitlines():
                device, inode = line.split()[3:5]
                major, minor = (int(number, 16) for number in device.split(":"))
                found.add((os.makedev(major, minor), int(inode)))
        with suppress(OSError):
            for file in (process / "fd").iterdir():
                with suppress(OSError):
                    found.add((file.stat().st_dev, file.stat().st_ino))
    return found


def still_there(folder: Path, held: Set[Inode]) -> list[str]:
    """Return the paths in a folder whose files were open or mapped."""
    left = []
    for path in folder.iterdir():
        with suppress(OSError):
            if (path.stat().st_dev, path.stat().st_ino) in held:
                left.append(str(path))
    return sorted(left)


def _has_rows(metrics: Path) -> bool:
    """Return whether a run has finished its first update."""
    return metrics.exists() and metrics.stat().st_size > 0


def _heed_interrupts() -> None:
    """Restore the default SIGINT, which processes started by a shell with & ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def soak(config: str, overrides: Sequence[str], minutes: float, every: float, base_dir: Path) -> dict[str, Any]:
    """Train for some minutes, and take samples.

    Args:
        config: as for `cyborg-torchrl train --config`.
        overrides: overrides of the configuration.
        minutes: duration from the first update on, since imports take long on a busy machine.
        every: seconds between samples.
        base_dir: folder of the run's folder.

    Returns:
        The findings, the samples, the resources left behind, and the run's summary.
    """
    import psutil

    marker = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = base_dir / f"soak-{marker[:8]}"
        own = [f"logger.base_dir={base_dir}", f"logger.run_name={folder.name}", "logger.progress=false"]
        own += [f"train.total_timesteps={FOREVER}"]
        held = set[Inode]()
        began: float | None = None
        running = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, config, *overrides, *own],
            env={**os.environ, MARKER: marker, "TMPDIR": temporary},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
        process, samples = psutil.Process(running.pid), list[Sample]()
        try:
            with Progress(transient=True) as progress:
                bar = progress.add_task("soaking", total=minutes * 60)
                while running.poll() is None and (began is None or time.monotonic() - began < minutes * 60):
                    time.sleep(every)
                    if began is None:
                        began = time.monotonic() if _has_rows(folder / "logs" / "metrics.csv") else None
                    elif sample := sample_of(process, began):
                        samples.append(sample)
                        progress.update(bar, completed=sample.seconds)
                    with suppress(psutil.Error):
                        held |= held_by(running.pid, *(each.pid for each in process.children(recursive=True)))
            is_early = running.poll() is not None
        finally:
            output, said = _interrupt(running)
        end = time.monotonic() + 10
        # a helper of multiprocessing removes semaphores a moment later
        while (left_behind(marker) or still_there(SHARED_MEMORY, held)) and time.monotonic() < end:
            time.sleep(0.2)
        result = findings(samples, minutes)
        result["processes_left"] = left_behind(marker)
        result["shared_memory_left"] = still_there(SHARED_MEMORY, held)
        result["temporary_files_left"] = sorted(names_in(Path(temporary)))
        summary = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        result |= {"ended_early": is_early, "said": said, "summary": summary[-1] if summary else None}
        result["samples"] = [sample._asdict() for sample in samples]
    return result


def _interrupt(running: subprocess.Popen[str]) -> tuple[str, str]:
    """Interrupt a run, kill it if it does not end, and return its stdout and stderr."""
    if running.poll() is None:
        os.killpg(running.pid, signal.SIGINT)
    try:
        return running.communicate(timeout=SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        return running.communicate()


def is_sound(result: dict[str, Any]) -> bool:
    """Return whether all checks of a run passed."""
    left = ("processes_left", "shared_memory_left", "temporary_files_left", "grown")
    is_told = result["summary"] is not None and result["summary"]["is_interrupted"]
    return result["is_flat"] and is_told and not result["ended_early"] and not any(result[name] for name in left)


def table_of(result: dict[str, Any]) -> Table:
    """Return the findings as a table."""
    table = Table("", "smallest", "largest", "first", "last", title="after the warm-up")
    for name in Sample._fields[1:]:
        if name in result:
            figures = result[name]
            table.add_row(name, *[f"{figures[column]:,.0f}" for column in ("smallest", "largest", "first", "last")])
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="memory_delayed_cue_recurrent", help="shipped, or a file (%(default)s)")
    parser.add_argument("--minutes", type=positive, default=30, help="how long (%(default)s)")
    parser.add_argument("--every", type=positive, default=5, help="seconds between samples (%(default)s)")
    parser.add_argument("--base-dir", type=Path, default=Path("runs"), help="where the run's folder goes (%(default)s)")
    parser.add_argument("--output", type=writable, help="a JSON file for the samples and the findings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    arguments = parser.parse_intermixed_args(argv)
    try:
        import psutil  # noqa: F401
    except ImportError:
        print("error: this needs psutil: pip install psutil", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        minutes, every = float(arguments.minutes), float(arguments.every)
        result = soak(arguments.config, arguments.overrides, minutes, every, arguments.base_dir)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if result["ended_early"] or result["summary"] is None:
        print(result["said"], end="", file=sys.stderr)
    if result["ended_early"]:
        return EXIT_BAD_INPUT
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(table_of(result))
    for name in ("rss_ratio", "own_ratio", "grown", "processes_left", "shared_memory_left", "temporary_files_left"):
        print(f"{name}: {result.get(name)}")
    steps = (result["summary"] or {}).get("total_timesteps")
    print(f"{'sound' if is_sound(result) else 'NOT SOUND'}, after {steps} environment steps")
    return 0 if is_sound(result) else 1


if __name__ == "__main__":
    sys.exit(main())
