"""Handling of interrupts and terminations, for runs and for the processes that they start."""

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
    """Delay SIGINT and `TERMINATIONS` until the block ends; signals never reach threads other than the main one.

    An interrupt inside torch's file writer would end in an error about the file. A delayed interrupt also replaces an
    error of the block, which may come from another process that received the same interrupt.
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
    """Block `INTERRUPTS` for processes that are started in the block, until they call `ignore_interrupts`.

    Ctrl-C reaches all processes of a terminal. A process that is still importing would end with a traceback.
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
    """Ignore `INTERRUPTS` in this process; the process that started it handles them and ends it."""
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
