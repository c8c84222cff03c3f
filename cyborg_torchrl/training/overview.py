"""Overview of a run at its start: its kernels, the size of its network, and how it reads the observations."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from cyborg_torchrl.cores.kernels.native import library_name
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.modules.encoders import ObservationEncoder

PARTS = ("encoder", "backbone", "fusion", "policy_head", "value_head", "critic")
"""Attributes of an agent that hold its parameters."""


def overview(agent: PPOAgent) -> dict[str, Any]:
    """Return the kernels, the parameters of each part of the network, and how it reads the observations.

    "kernels" is the instruction set of the C++ library that is used on a CPU, None without a library, or "cuda".
    """
    device = next(agent.parameters()).device.type
    sizes = {name: num_parameters(getattr(agent, name)) for name in PARTS}
    return {
        "kernels": library_name() if device == "cpu" else device,
        "parameters": {name: size for name, size in sizes.items() if size},
        "observations": cast("ObservationEncoder", agent.encoder).describe(),
    }


def overview_lines(content: dict[str, Any]) -> list[str]:
    """Return an overview as lines to print."""
    kernels, sizes = content["kernels"], content["parameters"]
    parts = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in sizes.items())
    lines = [f"network: {sum(sizes.values()):,} parameters ({parts})", f"observations: {content['observations']}"]
    if kernels is None:
        lines.append("kernels: plain torch, which is slower; to build those in C++, reinstall with a C++17 compiler")
    else:
        lines.append(f"kernels: {kernels}" if kernels == "cuda" else f"kernels: C++ for {kernels}")
    return lines


def num_parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
