"""Steps at which a loop over time has to apply a reset."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor


def reset_steps(is_init: Bool[Tensor, "T B"]) -> list[bool]:
    """Return for each step if an episode may begin in any row. Loops over time skip the reset at all other steps.

    On a GPU this is every step. Reading the flags would wait for the GPU, which a CUDA graph does not allow.
    """
    return is_init.any(1).tolist() if is_init.is_cpu else [True] * len(is_init)
