"""What an agent reads from a memory while it acts."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cyborg_torchrl.cores.kernels.native import function, integers, is_native, needs_operator


def read_memory(memory: Float[Tensor, "B D N"], query: Float[Tensor, "B N"]) -> Float[Tensor, "B D"]:
    """Products of a query with the N numbers of each channel, in double precision on a CPU and in exported steps.

    What is read is normalised: where a query fits nothing that is remembered, the products cancel, and the norm makes
    their rounding a hundred times as loud. It was most of what parted an exported `mamba2` from its agent. Where a
    gradient is needed, and on a GPU, it is torch's product.

    Args:
        memory: what is remembered.
        query: what is asked for, one for all channels.
    """
    is_exporting = torch.compiler.is_exporting()
    if not is_exporting and (memory.device.type != "cpu" or needs_operator((memory, query))):
        return torch.matmul(memory, query.unsqueeze(-1)).squeeze(-1)
    if not is_native(memory) or query.dtype != memory.dtype:
        return torch.matmul(memory.double(), query.double().unsqueeze(-1)).squeeze(-1).to(memory.dtype)
    memory, query = memory.contiguous(), query.contiguous()
    result = memory.new_empty(memory.shape[:2])
    sizes = integers(*memory.shape)
    run = function("read", memory.dtype)
    run(sizes, torch.get_num_threads(), memory.data_ptr(), query.data_ptr(), result.data_ptr())
    return result
