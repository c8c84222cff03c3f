"""Steps at which a loop over time has to apply a reset."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor


def reset_steps(is_init: Bool[Tensor, "T B"]) -> list[bool]:
    """Return for each step if an episode begins in any row. Loops over time skip the reset at all other steps."""
    return is_init.any(1).tolist()
