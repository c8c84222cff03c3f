"""Comparison of sequence mode with repeated steps."""

from __future__ import annotations

import torch

from cyborg_torchrl.checks.findings import Finding, judge
from cyborg_torchrl.checks.probe import Probe, distance

NAME = "step against sequence"


@torch.no_grad()
def check_modes(probe: Probe, tolerance: float) -> Finding:
    """Compare the distribution parameters of both modes, from the same states and with resets."""
    everywhere = torch.ones(probe.steps.shape, dtype=torch.bool)
    return judge(
        NAME,
        distance(probe.run("step").params, probe.run("sequence").params, everywhere),
        tolerance,
        passed="Sequence mode gives what step mode gives, step by step.",
        failed="Sequence mode gives other distributions than the same steps one by one: it starts from another "
        "state, restarts elsewhere, or does not carry memory along the sequence.",
        cure="Make the sequence a loop of the step from the first step's stored state first; then make it fast.",
    )
