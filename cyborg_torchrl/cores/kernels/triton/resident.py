"""The choice between resident weights and one matrix product per step, for `gru` and `lstm`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cyborg_torchrl.cores.kernels.triton.launch import next_power_of_2
from cyborg_torchrl.cores.kernels.triton.loading import shared_memory

MIN_SIZE = 32
"""Twice the smallest number of columns of a matrix product in Triton."""
MAX_SIZE = 128
MARGIN = 24 * 1024
"""Bytes of shared memory for everything but the weights."""
BLOCK = 512
"""Numbers of a state that a program of a single step computes."""


def padded(size: int) -> int:
    """Return the size of a state in a kernel with resident weights."""
    return max(MIN_SIZE, next_power_of_2(size))


def is_resident(weight: Tensor, gates: int) -> bool:
    """Return True if the weights [D, D] of some gates, of a weight [G D, D], fit into a program's shared memory."""
    size = padded(weight.shape[1])
    return size <= MAX_SIZE and 4 * gates * size * size + MARGIN <= shared_memory(weight)


def constants(size: int) -> dict[str, Any]:
    """Return the constants of a kernel with resident weights.

    They do not depend on the number of environments, so that acting and training use the same machine code.
    """
    is_largest = padded(size) == MAX_SIZE
    # With more stages, Triton would keep copies of parts that are read at each step. The largest has no room for them.
    shape = {"num_warps": 16, "num_stages": 1} if is_largest else {"num_warps": 4, "num_stages": 3}
    return {"D": size, "P": padded(size), "ROWS": 4, **shape}
