"""How past and present meet."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class PastPresentFusion(nn.Module):
    """Normalises the memory's read-out and the present features apart, then adds them.

        joint = LayerNorm(memory) + W LayerNorm(present)       (no W where the widths agree)

    Under one norm the present drowns the past: a slow memory writes little at each step.

    Args:
        present_features: F, width of the encoder's features.
        memory_features: D, width of the memory features and of the result.
    """

    def __init__(self, present_features: int, memory_features: int) -> None:
        super().__init__()
        self.past = nn.LayerNorm(memory_features)
        self.present = nn.LayerNorm(present_features)
        self.project = (
            nn.Identity()
            if present_features == memory_features
            else nn.Linear(present_features, memory_features, bias=False)
        )

    def forward(self, present: Float[Tensor, "*B F"], memory: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Returns the joint features."""
        return self.past(memory) + self.project(self.present(present))
