"""The device that a benchmark runs on."""

from __future__ import annotations

import argparse

import torch

from cyborg_torchrl.config import ConfigError
from cyborg_torchrl.config.checks import resolve_device


def device_here(text: str) -> torch.device:
    """Type of an argument: cpu, cuda, cuda:N or auto, if it is there; a GPU becomes the present one."""
    try:
        device = resolve_device(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if device.type == "cuda" and ":" in str(device):  # without a number it is the present one
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """What figures were measured on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def finish() -> None:
    """Waits for what a GPU still has to do: a call returns before it is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
