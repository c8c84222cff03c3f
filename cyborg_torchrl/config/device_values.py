"""Values of `train` that depend on the device."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from cyborg_torchrl.config.schema import TrainConfig

ON_CPU: dict[str, Any] = {"storage": "ram", "micro_batch_steps": 32_768, "cudagraph": False}
# A GPU waits for each number that is read, and for each of many small kernels; it has room for a whole minibatch.
ON_GPU: dict[str, Any] = {"storage": "device", "micro_batch_steps": sys.maxsize, "cudagraph": True}


def by_device(device: torch.device) -> dict[str, Any]:
    """Return the values for a device, by name."""
    return ON_GPU if device.type == "cuda" else ON_CPU


def with_device_values(train: TrainConfig, device: torch.device) -> TrainConfig:
    """Return the hyperparameters where the values for a device replace None."""
    values = {key: value for key, value in by_device(device).items() if getattr(train, key) is None}
    return dataclasses.replace(train, **values)
