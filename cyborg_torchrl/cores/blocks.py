"""Sequences cut into blocks of steps that fit into a processor's cache.

Pointwise operations over a long sequence wait for main memory, because each one reads and writes the whole sequence.
In a block, all operations but the first find their operands in the cache. The cost per step is then independent of
the sequence length.
"""

from __future__ import annotations

from torch import Tensor

BLOCK_NUMEL = 2**17
"""Numbers in a block of one tensor. About five such tensors fit into the cache of one processor core."""


def blocks(x: Tensor, tensors: int = 1) -> list[slice]:
    """Return the blocks of a sequence [T, ...], in order. Only the last may be shorter.

    On a GPU all steps are one block, because launching a kernel costs more than waiting for memory.

    Args:
        x: the sequence.
        tensors: memory per step, as a multiple of the numbers in a step of `x`.
    """
    if x.device.type != "cpu":
        return [slice(0, x.shape[0])]
    length = max(1, BLOCK_NUMEL // max(1, tensors * x[0].numel()))
    return [slice(start, min(start + length, x.shape[0])) for start in range(0, x.shape[0], length)]
