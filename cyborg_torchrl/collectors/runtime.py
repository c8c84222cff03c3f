"""Settings of a process that make small networks fast on a CPU."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Generator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def prepare_cpu(num_threads: int = 1) -> None:
    """Set this process's threads and allocator, and flush denormal numbers to zero.

    Changes the whole process, so programs call it, and nothing in the package does so on import or while it builds.
    A memory state that decays becomes a denormal number, which a CPU computes ten times slower.
    """
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)  # decayed memory states are denormal numbers
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
    """Search for cyclic garbage a hundred times less often inside the block.

    Steps make many short-lived objects and no cycles. The search took 5 % of a rollout's time.
    """
    threshold = gc.get_threshold()
    gc.set_threshold(100 * threshold[0], *threshold[1:])
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
