"""Reads from a memory while an agent acts, in double precision."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cyborg_torchrl.cores.kernels.native import is_native, needs_gradient, run


def read_memory(memory: Float[Tensor, "B D N"], query: Float[Tensor, "B N"]) -> Float[Tensor, "B D"]:
    """Return the product of a query with the N numbers of each channel.

    The sum uses double precision on a CPU and in exported steps. A norm follows the read. If a query matches nothing
    in memory, the products cancel, and the norm amplifies their rounding about a hundred times. This was the largest
    difference between an exported `mamba2` and its agent. With a gradient, and on a GPU, torch's product is used.

    Args:
        memory: numbers of each channel.
        query: the read vector, shared by all channels.
    """
    is_acting = memory.device.type == "cpu" and not needs_gradient((memory, query))
    if not is_acting and not torch.compiler.is_exporting():
        return torch.matmul(memory, query.unsqueeze(-1)).squeeze(-1)
    # Exported steps run without our library: they contain the same double precision in torch's operations.
    if not is_native(memory) or query.dtype != memory.dtype:
        return torch.matmul(memory.double(), query.double().unsqueeze(-1)).squeeze(-1).to(memory.dtype)
    result = memory.new_empty(memory.shape[:2])
    run("read", (1, *memory.shape), [memory.contiguous(), query.contiguous()], [result])
    return result
