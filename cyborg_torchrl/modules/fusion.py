"""How past and present meet."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cyborg_torchrl.cores.kernels.group_norm import added_layer_norms_cpp
from cyborg_torchrl.cores.kernels.native import is_native


class PastPresentFusion(nn.Module):
    """Normalises the memory's read-out and the present features apart, then adds them.

        joint = LayerNorm(memory) + W LayerNorm(present)       (no W where the widths agree)

    Under one norm the present drowns the past: a slow memory writes little at each step. With a sum alone, what is seen
    cannot choose among what is remembered, since the heads are linear: a question has to multiply. Gated, the past is
    multiplied by 1 + G LayerNorm(present), with G zero at the start.

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
        self.project = (
            nn.Identity()
            if present_features == memory_features
            else nn.Linear(present_features, memory_features, bias=False)
        )

    def forward(self, present: Float[Tensor, "*B F"], memory: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Returns the joint features."""
        is_acting = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if is_acting and self.is_plain and present.ndim == 2 and self._is_native(present, memory):
            # a step: one call in place of three
            return added_layer_norms_cpp(memory, present, (self.past, self.present))
        past, now = self.past(memory), self.present(present)
        joint = past + (now if self.is_same_width else self.project(now))
        return joint if self.gate is None else torch.addcmul(joint, past, self.gate(now))

    def _is_native(self, present: Tensor, memory: Tensor) -> bool:
        is_one_type = memory.dtype is present.dtype is self.past.weight.dtype
        is_one_size = memory.shape == present.shape and memory.shape[-1] == self.past.normalized_shape[0]
        return is_one_type and is_one_size and is_native(memory)  # what is not, torch refuses
