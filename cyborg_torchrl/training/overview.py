"""Overview of a run at its start: its kernels, the size of its network, and the observations that it reads."""

from __future__ import annotations

from typing import Any

from tensordict.utils import NestedKey
from torch import nn

from cyborg_torchrl.cores.kernels.native import library_name
from cyborg_torchrl.modules import PPOAgent

PARTS = ("encoder", "backbone", "fusion", "policy_head", "value_head", "critic")
"""Attributes of an agent that hold its parameters."""


def overview(agent: PPOAgent) -> dict[str, Any]:
    """Return the kernels, the parameters of each part of the network, and the observations that it reads.

    "kernels" is the instruction set of the C++ library that is used on a CPU, None without a library, or "cuda".
    """
    device = next(agent.parameters()).device.type
    sizes = {name: num_parameters(getattr(agent, name)) for name in PARTS}
    return {
        "kernels": library_name() if device == "cpu" else device,
        "parameters": {name: size for name, size in sizes.items() if size},
        "observations": [_dotted(key) for key in agent.observed_keys],
    }


def overview_lines(content: dict[str, Any]) -> list[str]:
    """Return an overview as lines to print."""
    kernels, sizes = content["kernels"], content["parameters"]
    parts = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in sizes.items())
    lines = [f"network: {sum(sizes.values()):,} parameters ({parts})", f"reads: {', '.join(content['observations'])}"]
    if kernels is None:
        lines.append("kernels: plain torch, which is slower; to build those in C++, reinstall with a C++17 compiler")
    else:
        lines.append(f"kernels: {kernels}" if kernels == "cuda" else f"kernels: C++ for {kernels}")
    return lines


def num_parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _dotted(key: NestedKey) -> str:
    return key if isinstance(key, str) else ".".join(key)
