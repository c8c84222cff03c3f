"""Interrupts and terminations: who handles them, and when."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

TERMINATIONS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a process: from a scheduler, or from a terminal that is closed."""
INTERRUPTS = (signal.SIGINT, *(number for number in TERMINATIONS if number != signal.SIGTERM))
"""Signals that a terminal sends to all processes in it."""


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
