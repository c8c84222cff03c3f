"""The optimiser of a training run, and its learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from cyborg_torchrl.config import TrainConfig

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2.0,
}
"""Factors of the learning rate by the finished share of a run, in [0, 1]."""


def build_optimizer(config: TrainConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimiser `config.optimizer`, in a form that a CUDA graph can capture if `config.cudagraph` is set."""
    options: dict[str, Any] = {"lr": config.learning_rate, "eps": config.adam_eps}
    if config.cudagraph:
        options["lr"] = torch.tensor(config.learning_rate, device=parameters[0].device)
        options["capturable"] = parameters[0].device.type == "cuda"
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, **options)
    # One kernel for all parameters, where torch has it.
    options["fused"] = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, weight_decay=config.weight_decay, **options)
    return torch.optim.Adam(parameters, **options)


def learning_rate(config: TrainConfig, finished_share: float) -> float:
    """Return the learning rate after a share of the run; it is above 1 in a run that was made longer."""
    rate = cast("float", config.learning_rate)  # the trainer has replaced None
    return rate * SCHEDULES[config.lr_schedule](min(finished_share, 1.0))
