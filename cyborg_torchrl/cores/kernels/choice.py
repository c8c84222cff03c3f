"""The choice between the paths of a recurrence: C++ on a CPU, Triton on a GPU, or torch."""

from __future__ import annotations

from torch import Tensor

from cyborg_torchrl.cores.kernels.native import is_native
from cyborg_torchrl.cores.kernels.triton.loading import is_triton


def kernel_for(tensor: Tensor) -> str:
    """Return the fastest path for a tensor's device and dtype: "cpp", "triton" or "torch"."""
    if is_native(tensor):
        return "cpp"
    return "triton" if is_triton(tensor) else "torch"
