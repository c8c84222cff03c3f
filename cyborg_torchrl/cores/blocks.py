"""Sequences cut into blocks of steps small enough for a processor's cache.

Pointwise mathematics over a long sequence waits for main memory: each operation reads and writes all of it. Block by
block, all operations but the first find their operands in the cache, and the cost of a step does not grow with the
length of the sequence.
"""

from __future__ import annotations

BLOCK_NUMEL = 2**17
"""Numbers in a block of one tensor: a handful of such tensors fit into the cache of one core."""


def block_length(steps: int, numel_per_step: int, block_numel: int | None = None) -> int:
    """Steps in a block: at least one, at most all."""
    return max(1, min(steps, (block_numel or BLOCK_NUMEL) // max(1, numel_per_step)))


def blocks(steps: int, numel_per_step: int) -> list[slice]:
    """The blocks of a sequence, in order; only the last may be shorter."""
    length = block_length(steps, numel_per_step)
    return [slice(start, min(start + length, steps)) for start in range(0, steps, length)]
