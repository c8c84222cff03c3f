"""The fusion of memory features and present features."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cyborg_torchrl.cores.kernels.group_norm import added_layer_norms_cpp
from cyborg_torchrl.cores.kernels.native import is_native


class PastPresentFusion(nn.Module):
    """Sum of the memory features and the present features, each under a norm.

        joint = LayerNorm(memory) + W LayerNorm(present)       (no W if the widths agree)

    Two norms are needed because a slow memory writes little at each step: under one norm the present would drown the
    past. The heads are linear, so with a sum alone a question could not choose among memories. With a gate, the past is
    multiplied by 1 + G LayerNorm(present), and G is zero at the start.

    Source: feature-wise linear modulation, Perez et al. (2018), of the past by the present.

    Args:
        present_features: F, width of the encoder's features.
        memory_features: D, width of the memory features and of the result.
        is_gated: let the present gate the past.
    """

    def __init__(self, present_features: int, memory_features: int, *, is_gated: bool = False) -> None:
        super().__init__()
        self.past = nn.LayerNorm(memory_features)
        self.present = nn.LayerNorm(present_features)
        self.gate = nn.Linear(present_features, memory_features, bias=False) if is_gated else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
        self.is_same_width = present_features == memory_features
        self.is_plain = self.is_same_width and not is_gated
        self.project: nn.Module = nn.Identity()
        if not self.is_same_width:
            self.project = nn.Linear(present_features, memory_features, bias=False)

    def forward(self, present: Float[Tensor, "*B F"], memory: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Return the joint features."""
        is_acting = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if is_acting and self.is_plain and present.ndim == 2 and self._is_native(present, memory):
            # A step while acting: one C++ call instead of three torch calls.
            return added_layer_norms_cpp(memory, present, (self.past, self.present))
        past, now = self.past(memory), self.present(present)
        joint = past + (now if self.is_same_width else self.project(now))
        return joint if self.gate is None else torch.addcmul(joint, past, self.gate(now))

    def _is_native(self, present: Tensor, memory: Tensor) -> bool:
        is_one_type = memory.dtype is present.dtype is self.past.weight.dtype
        is_one_size = memory.shape == present.shape and memory.shape[-1] == self.past.normalized_shape[0]
        return is_one_type and is_one_size and is_native(memory)  # torch reports any mismatch
