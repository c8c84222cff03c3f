"""Times of computations on a GPU, without a graph and in a CUDA graph. On a CPU, a clock tests the same code."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from statistics import median
from typing import Any, NamedTuple

import torch

from cyborg_torchrl.training.graphed_step import WARM_UPS, CudaGraphs

Row = dict[str, Any]
Run = Callable[[], object]
SECONDS = 0.3
"""Time that the repeats of one computation may take."""
MIN_REPEATS, MAX_REPEATS = 3, 50
PREPARE_SECONDS = 30.0
"""Time that another library may take to prepare a computation. Its kernels are tuned and compiled at first use."""


class Subject(NamedTuple):
    """A computation that is timed."""

    name: str
    build: Callable[[], Run]
    is_ours: bool = True
    allow_tf32: bool = True
    """cuDNN may round to TF32, as it does by torch's default."""


def timed(subject: Subject, device: torch.device, about: Row) -> Iterator[Row]:
    """Yield a row without a graph and one in a graph: medians in milliseconds, or the reason why there is none."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = subject.allow_tf32
    try:
        yield from _timed(subject, device, about)
    finally:
        torch.backends.cudnn.allow_tf32 = before
        if device.type == "cuda":
            with suppress(RuntimeError):  # the allocator may refuse after a capture that failed
                torch.cuda.empty_cache()


def _timed(subject: Subject, device: torch.device, about: Row) -> Iterator[Row]:
    run: Run | None = None
    for mode in ("eager", "graph"):
        row = {**about, "subject": subject.name, "mode": mode}
        try:
            if run is None:
                with time_limit(None if subject.is_ours else PREPARE_SECONDS):
                    run = subject.build()
                    warm_up(run, device)
            row |= milliseconds(run if mode == "eager" else in_graph(run, device), device)
        except Exception as error:
            # Ours must run. Other libraries may be missing, and not every computation can be captured.
            has_failed = subject.is_ours and mode == "eager"
            yield row | {"error" if has_failed else "left_out": reason_of(error)}
            if run is None:
                break
        else:
            yield row


def milliseconds(run: Run, device: torch.device) -> Row:
    """Time a computation that has warmed up. Return the median, the fastest and the slowest run."""
    started = time.perf_counter()
    run()
    _synchronize(device)
    repeats = int(SECONDS / (time.perf_counter() - started))
    times = _times(run, min(max(repeats, MIN_REPEATS), MAX_REPEATS), device)
    return {"ms": median(times), "fastest_ms": min(times), "slowest_ms": max(times), "repeats": len(times)}


def _times(run: Run, repeats: int, device: torch.device) -> list[float]:
    if device.type != "cuda":
        times: list[float] = []
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - started))
        return times
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:  # nothing waits in between, so that the host can run ahead of the GPU
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def warm_up(run: Run, device: torch.device) -> None:
    """Run a computation some times, as a capture needs it. Kernels are compiled here."""
    for _ in range(WARM_UPS):
        if device.type == "cuda":
            CudaGraphs().warm_up(run)
        else:
            run()
    _synchronize(device)


def in_graph(run: Run, device: torch.device) -> Run:
    """Return the replay of a computation that has warmed up.

    Raises:
        RuntimeError: if it cannot be captured.
    """
    if device.type != "cuda":
        raise RuntimeError("a CPU has no CUDA graphs")
    # A capture that fails harms what follows in the process. Most fail where the host waits for the GPU.
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.current_stream()
    try:
        return CudaGraphs().capture(run)
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails does not restore it


def reason_of(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".removesuffix(": ")


@contextmanager
def time_limit(seconds: float | None) -> Generator[None]:
    """Raise TimeoutError in the block after some seconds; None: never. For the main thread."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not ready after {seconds:g} s")

    if seconds is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
