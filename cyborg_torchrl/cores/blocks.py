"""Sequences cut into blocks of steps small enough for a processor's cache.

Pointwise mathematics over a long sequence waits for main memory: each operation reads and writes all of it. Block by
block, all operations but the first find their operands in the cache, and the cost of a step does not grow with the
length of the sequence.
"""

from __future__ import annotations

from torch import Tensor

BLOCK_NUMEL = 2**17
"""Numbers in a block of one tensor: a handful of such tensors fit into the cache of one core."""


def blocks(x: Tensor, tensors: int = 1) -> list[slice]:
    """The blocks of a sequence [T, ...], in order; only the last may be shorter.

    On a GPU, where a kernel's start costs more than the memory that it waits for, all steps are one block.

    Args:
        x: the sequence.
        tensors: how many times the numbers of `x` a step takes.
    """
    if x.device.type != "cpu":
        return [slice(0, x.shape[0])]
    length = max(1, BLOCK_NUMEL // max(1, tensors * x[0].numel()))
    return [slice(start, min(start + length, x.shape[0])) for start in range(0, x.shape[0], length)]
