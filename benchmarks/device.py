"""The device that a benchmark runs on."""

from __future__ import annotations

import argparse

import torch

from cyborg_torchrl.config import ConfigError
from cyborg_torchrl.config.checks import resolve_device


def device_here(text: str) -> torch.device:
    """Parse an argument: cpu, cuda, cuda:N or auto. A GPU becomes the current device."""
    try:
        device = resolve_device(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if device.type == "cuda" and ":" in str(device):  # the current one if there is no number
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """Return the name of a device, for tables."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def finish() -> None:
    """Wait until a GPU has finished, since calls return before that."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
