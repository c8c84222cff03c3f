"""An encoder in reduced precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_FEATURES = {"bfloat16": "bf16", "float16": "fp16"}
"""Part of the names of the instructions that compute in a type: avx512_bf16, amx_bf16, avx512_fp16, ..."""


def is_emulated(dtype: str | None, device: torch.device) -> bool:
    """Return whether the CPU has no instructions for a reduced precision. It is then slower than float32.

    False on other devices, without autocast, and where torch cannot tell.
    """
    if dtype is None or device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    features = torch.cpu.get_capabilities()
    return not any(is_there for name, is_there in features.items() if CPU_FEATURES[dtype] in name)


class Autocast(nn.Module):
    """A network under `torch.autocast` with float32 output.

    It wraps the encoder only. The memory states would lose precision, so the memory, its read-out and the heads stay
    float32. Acting and training run the same network, so log-probabilities agree except for its rounding.

    Args:
        network: the network; its parameters do not change.
        dtype: "bfloat16", or "float16" (on GPUs; small gradients may vanish, since there is no loss scaling).

    Raises:
        ValueError: if there is no such type.
    """

    def __init__(self, network: nn.Module, dtype: str) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"unknown autocast '{dtype}'; known: {', '.join(DTYPES)}, or null.")
        self.network, self.dtype = network, DTYPES[dtype]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the output of the network in float32."""
        with torch.autocast(inputs[0].device.type, self.dtype):
            features = self.network(*inputs)
        return features.float()
