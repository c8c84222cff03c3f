"""An encoder in reduced precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Autocast(nn.Module):
    """Runs a network under `torch.autocast`; what it returns is float32 again.

    It stands around the encoder alone, so that the memory, whose states would lose what they keep, the read-out and the
    heads stay float32. Acting and training run the same network, so log-probabilities agree up to its rounding.

    Args:
        network: parameters stay as they are.
        dtype: "bfloat16", or "float16" (on GPUs; small gradients may vanish in it, and nothing here scales them).

    Raises:
        ValueError: if there is no such type.
    """

    def __init__(self, network: nn.Module, dtype: str) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"unknown autocast '{dtype}'; known: {', '.join(DTYPES)}, or null.")
        self.network, self.dtype = network, DTYPES[dtype]

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the network makes of its inputs, in float32."""
        with torch.autocast(inputs[0].device.type, self.dtype):
            features = self.network(*inputs)
        return features.float()
