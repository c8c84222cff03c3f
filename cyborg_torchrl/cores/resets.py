"""Where loops over time have to stop for a reset."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor


def reset_steps(is_init: Bool[Tensor, "T B"]) -> list[bool]:
    """For each step, whether an episode begins in any row: loops over time skip the reset everywhere else."""
    return is_init.any(1).tolist()
