"""A place for torch's large CPU tensors, in which they do not break the heap into pieces.

glibc before 2.38 does not fit an aligned block, which all of torch's are, into a freed one of the same size, and a
small block that stays where a large one used to lie makes the heap longer by the large one: what a run has in memory
rises and falls with chance. Once the pool is installed, tensors of 64 KiB and more lie in it, each at the lowest
address where it fits (first fit in order of address: Knuth, The Art of Computer Programming, volume 1, section 2.5),
and what is freed is used again without asking the system for it.

It is built in C++ where the package is installed beside torch, on Linux. Nothing is missing without it but memory.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

SWITCH = "CYBORG_TENSOR_POOL"
LIBRARY = Path(__file__).parent / "_tensor_pool.so"


@cache
def library() -> ctypes.CDLL | None:
    """The C++ functions, if they were built for the torch that is here."""
    try:
        found = ctypes.CDLL(os.fspath(LIBRARY))
        found.cyborg_pool_built_for.restype = ctypes.c_char_p
        if found.cyborg_pool_built_for().decode() != torch.__version__.partition("+")[0]:
            return None
        found.cyborg_pool_install.restype = ctypes.c_bool
        found.cyborg_pool_release.argtypes, found.cyborg_pool_release.restype = [ctypes.c_bool], ctypes.c_size_t
        found.cyborg_pool_in_use.restype = ctypes.c_size_t
    except (OSError, AttributeError):  # not built, or built on another system, or from another version's source
        return None
    return found


def install() -> bool:
    """Puts this process's large CPU tensors into the pool from now on; those that are there stay where they are.

    Returns:
        Whether they are: not where nothing was built, where another allocator has taken torch's place, where
        addresses are limited (`ulimit -v`, `-d`) or count as memory (`vm.overcommit_memory=2`), since the pool reserves
        as many as there is memory and uses what it needs, and not with CYBORG_TENSOR_POOL=0 in the environment, for
        schedulers that count addresses.
    """
    if os.environ.get(SWITCH) == "0":
        return False
    found = library()
    return found is not None and found.cyborg_pool_install()


def release(*, everything: bool = False) -> int:
    """Gives free memory of the pool back to the system.

    Args:
        everything: all that no tensor lies on; else what lies above all tensors that there were since the last call.

    Returns:
        How many bytes; 0 where nothing is installed.
    """
    found = library()
    return 0 if found is None else found.cyborg_pool_release(everything)


def bytes_in_use() -> int:
    """Bytes of the tensors in the pool; 0 where nothing is installed."""
    found = library()
    return 0 if found is None else found.cyborg_pool_in_use()
