"""Trains for a long time, and looks at what the run holds and leaves behind.

python -m benchmarks.soak --minutes 30 --output soak.json
python -m benchmarks.soak --config public_benchmark env=gymnasium id=CartPole-v1 env.workers=2

A run in a process of its own is sampled from its first update on, and interrupted at the end. Exit code 0 if, after a
tenth of the time, its own memory never was 5 % above the median of the first half, and it had no more open files,
threads or processes than before, and if nothing was left afterwards: no process, no shared memory that a sample saw it
hold, no temporary file; 1 if not. A process's own memory is what is resident less the pages of files, which the system
takes away and brings back as it likes. It may fall for a moment: protobuf, which TensorBoard's files are written with,
has glibc give all freed memory back every now and then. With glibc before 2.38 it may rise again by a quarter, which
is the allocator's doing and not a leak: then soak with LD_PRELOAD=libjemalloc.so.2.
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

PROGRAM = "import sys; from cyborg_torchrl.training.command import run_command as run; sys.exit(run(sys.argv[1], sys.argv[2:]))"
MARKER = "CYBORG_TORCHRL_SOAK"
WARM_UP = 0.1
"""Share of the time in which a run may still grow: buffers fill, threads and workers begin."""
TOLERANCE = 0.05
"""Of own memory: by how much its largest value may exceed the median of the first half."""
SHARED_MEMORY = Path("/dev/shm")
Inode = tuple[int, int]
"""Device and number of a file."""
FOREVER = 10**15
SECONDS_TO_END = 60.0


class Sample(NamedTuple):
    """What a run and the processes under it hold."""

    seconds: float
    rss_mb: float
    """Resident."""
    own_mb: float
    """Resident, less what belongs to files."""
    files: int
    """Open, sockets and pipes among them."""
    threads: int
    processes: int


def sample_of(process: Any, began: float) -> Sample | None:
    """A sample of a `psutil.Process` and those under it; None if one of them ended meanwhile."""
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
    """What samples show after the warm-up.

    Args:
        samples: in order of time.
        minutes: how long there were to be samples.

    Returns:
        Of each figure but the time: the smallest, the largest, the first and the last; whether memory was flat; and
        whether anything else has grown for good, which is if it is never again what it once was.
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
    """Command lines of the processes that a run has started and that are still there."""
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
    """Paths of what lies in folders."""
    return {str(path) for folder in folders if folder.is_dir() for path in folder.iterdir()}


def held_by(*pids: int) -> set[Inode]:
    """What processes have open or mapped.

    By inode: a semaphore is mapped while it has another name than the one that it gets.
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
    """Paths in a folder of what was held."""
    left = []
    for path in folder.iterdir():
        with suppress(OSError):
            if (path.stat().st_dev, path.stat().st_ino) in held:
                left.append(str(path))
    return sorted(left)


def _has_rows(metrics: Path) -> bool:
    """Whether a run has come to its first update."""
    return metrics.exists() and metrics.stat().st_size > 0


def _heed_interrupts() -> None:
    """What a shell has started with & ignores SIGINT, and so does what that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def soak(config: str, overrides: Sequence[str], minutes: float, every: float, base_dir: Path) -> dict[str, Any]:
    """Trains for so long.

    Args:
        config: as for `python -m cyborg_torchrl.train`.
        overrides: changes to it.
        minutes: how long, from the first update on: importing and building takes as long as a machine is busy.
        every: seconds between samples.
        base_dir: where the run's folder goes.

    Returns:
        The findings, the samples, what was left behind, and what the run said of itself.
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
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGINT)
            try:
                output, said = running.communicate(timeout=SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                output, said = running.communicate()
        end = time.monotonic() + 10
        # a helper of multiprocessing ends, and takes semaphores with it, a moment later
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


def is_sound(result: dict[str, Any]) -> bool:
    """Whether a run held what it had, and left nothing."""
    left = ("processes_left", "shared_memory_left", "temporary_files_left", "grown")
    is_told = result["summary"] is not None and result["summary"]["is_interrupted"]
    return result["is_flat"] and is_told and not result["ended_early"] and not any(result[name] for name in left)


def table_of(result: dict[str, Any]) -> Table:
    """The findings as a table."""
    table = Table("", "smallest", "largest", "first", "last", title="after the warm-up")
    for name in Sample._fields[1:]:
        if name in result:
            figures = result[name]
            table.add_row(name, *[f"{figures[column]:,.0f}" for column in ("smallest", "largest", "first", "last")])
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Soaks. Returns the exit code."""
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
