"""The device and the machine that a benchmark runs on."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

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


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Describe the machine, and the versions of packages; None for a package that is not installed."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }
