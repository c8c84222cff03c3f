"""What makes a process compute small networks fast on a CPU."""

from __future__ import annotations

import ctypes
import gc
import platform
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
TERMINATIONS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What tells a process to end: of a scheduler, or of a terminal that is closed."""
INTERRUPTS = (signal.SIGINT, *(number for number in TERMINATIONS if number != signal.SIGTERM))
"""What a terminal sends to all processes in it."""


def prepare_cpu(num_threads: int = 1) -> None:
    """Set this process's threads and allocator, and flush denormal numbers to zero.

    Changes the whole process, so programs call it, and nothing in the package does so on import or while it builds.
    A memory state that decays becomes a denormal number, which a CPU computes ten times slower.
    """
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc's allocator keep freed memory; without glibc, do nothing.

    By default glibc returns blocks of some megabytes to the system as soon as they are freed. The next tensor of that
    size touches every page again, which takes longer than many an operation on it.
    """
    if platform.libc_ver()[0] == "glibc":
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 * 2**20)):
            ctypes.CDLL(None).mallopt(option, value)


@contextmanager
def rare_garbage_collection() -> Generator[None]:
    """Looks for cycles of garbage a hundred times more rarely: steps make many short-lived objects, and no cycles.

    Looking took 5 % of a rollout's time.
    """
    threshold = gc.get_threshold()
    gc.set_threshold(100 * threshold[0], *threshold[1:])
    try:
        yield
    finally:
        gc.set_threshold(*threshold)


@contextmanager
def interrupts_deferred() -> Generator[None]:
    """Lets SIGINT and `TERMINATIONS` wait until the block is done; in another thread than the main one they never come.

    An interrupt inside of torch's file writer ends in an error about the file instead. One that came comes before an
    error of the block, which may be of another process that has got the same interrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append((number, frame))

    handlers = {number: signal.signal(number, remember) for number in (signal.SIGINT, *TERMINATIONS)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number, frame in received[:1]:
            handler = handlers[signal.Signals(number)]
            if callable(handler):
                handler(number, frame)
            else:
                signal.raise_signal(number)


@contextmanager
def interrupts_blocked() -> Generator[None]:
    """Keeps `INTERRUPTS` from processes that are started in the block, until they call `ignore_interrupts`.

    Ctrl-C is for all processes of a terminal, and one that is still importing would end with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_interrupts() -> None:
    """Leaves `INTERRUPTS` to the process that has started this one, and ends it."""
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
