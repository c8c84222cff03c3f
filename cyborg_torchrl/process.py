"""What makes a process compute small networks fast on a CPU."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from cyborg_torchrl import tensor_pool

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
SPARE_BYTES = 2**30
"""What a process may keep of freed memory, whatever it uses."""
TERMINATIONS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What tells a process to end: of a scheduler, or of a terminal that is closed."""
INTERRUPTS = (signal.SIGINT, *(number for number in TERMINATIONS if number != signal.SIGTERM))
"""What a terminal sends to all processes in it."""


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


def prepare_cpu(num_threads: int = 1) -> None:
    """Sets torch's threads, flushes denormals, and keeps freed memory.

    Decayed memory states become denormal numbers, which a CPU handles ten times slower: they are flushed to zero.
    Large tensors get a place of their own (`tensor_pool`). Changes the whole process.
    """
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    tensor_pool.install()


def keep_freed_memory() -> bool:
    """Lets the allocator keep what is freed. Returns whether that could be done.

    glibc takes blocks of some megabytes from the system and gives them back when they are freed; touching them anew,
    page by page, takes longer than many an operation on them. Nothing is done where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    options = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 * 2**20}
    return all(mallopt(option, value) == 1 for option, value in options.items())


class FreedMemory:
    """Gives freed memory back to the system now and then, and at once where there is very much of it.

    What is resident is all that was ever used at once, not what an update needs. Without a `tensor_pool` it is more:
    glibc does not fit an aligned block into a freed one of the same size, so blocks of many megabytes, one after the
    other, take ever more of its heap (with sequences of 100,000 steps 5 GB in an update that needs 1), and a small
    block that stays, put where a large one used to fit, makes the heap longer by the large one. glibc's part is left
    where there is no such glibc, or no /proc.

    Args:
        spare_bytes: freed memory beyond this, and beyond a quarter of what is in use, is given back at once.
        every: seconds after which the heap's free memory is given back, and of the pool what it has not needed since.
        clock: seconds.
    """

    def __init__(
        self, spare_bytes: int = SPARE_BYTES, every: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.spare_bytes, self.every, self._clock = spare_bytes, every, clock
        self._next = clock() + every

    def give_back(self) -> bool:
        """Looks, and gives back what is too much. Returns whether any was; called where little is in use."""
        now = self._clock()
        is_mostly_spare = self._is_mostly_spare()
        if now < self._next and not is_mostly_spare:
            return False
        self._next = now + self.every
        released = tensor_pool.release(everything=is_mostly_spare)
        return _trim() or released > 0

    def _is_mostly_spare(self) -> bool:
        resident = _resident_memory()
        if resident <= self.spare_bytes:
            return False
        in_use = _heap_in_use()
        return in_use is not None and resident - in_use > max(self.spare_bytes, in_use // 4)


def _resident_memory() -> int:
    """Bytes of this process that are resident, but for those of files and those shared; 0 where there is no /proc."""
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _heap_in_use() -> int | None:
    try:
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = _MallInfo
        info = libc.mallinfo2()
    except (OSError, AttributeError):
        return None
    return info.uordblks + info.hblkhd + tensor_pool.bytes_in_use()


def _trim() -> bool:
    try:
        return ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0)) == 1
    except (OSError, AttributeError):
        return False


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
