"""Gradient horizon: how far back gradients reach, compared with how far back actions depend on observations."""

from __future__ import annotations

import torch
from torch import Tensor

from cyborg_torchrl.checks.findings import Finding, inform, skip
from cyborg_torchrl.checks.probe import TINY, Probe, random_weights
from cyborg_torchrl.checks.report import HorizonCurve

REACH, ABOVE_NOISE = "gradient horizon", "gradient above noise"
SEEN = 1e-5
"""Relative change of the distribution's parameters above rounding errors."""
NOISE = 1e-6
"""Share of the largest gradient below which a gradient has no effect in float32."""


def check_horizon(probe: Probe) -> tuple[list[Finding], HorizonCurve | None]:
    """Compare gradients in sequence mode with changes in step mode, on a probe without resets.

    If an action depends on the observation k steps before, the gradient k steps back must not be exactly zero. The
    gradient is taken of a random combination of the distribution's parameters. A log-prob would not do, since the
    log-prob of a policy that is certain has no gradient.
    """
    if not probe.tested.has_gradient:
        return [skip(REACH, "The policy computes no gradients.")], None
    curve = _observation_curve(probe) or _state_curve(probe)
    return [_judge_reach(curve), _report_noise(curve)], curve


def _observation_curve(probe: Probe) -> HorizonCurve | None:
    """Compare the last step with the observation k steps before it; return None if observations have no gradient."""
    leafy, observations, _ = probe.with_gradient()
    length = probe.steps.shape[1]
    params = leafy.run("sequence").params
    if not observations or not params.requires_grad:
        return None
    grads = torch.autograd.grad((random_weights(params)[:, -1] * params[:, -1]).sum(), observations, allow_unused=True)
    squares = [grad.reshape(*grad.shape[:2], -1).square().sum(-1) for grad in grads if grad is not None]
    gradient = torch.stack(squares).sum(0).sqrt().mean(0).flip(0) if squares else torch.zeros(length)
    if not bool((gradient > 0).any()):
        return None
    first = torch.zeros(probe.steps.shape, dtype=torch.bool)
    first[:, 0] = True
    influence = _influence(probe, first, torch.zeros(len(first), dtype=torch.bool))
    return HorizonCurve("observation", length, _floats(gradient), _floats(influence))


def _state_curve(probe: Probe) -> HorizonCurve:
    """Compare the k-th step of the sequence with the state before its first step."""
    leafy, _, states = probe.with_gradient()
    length = probe.steps.shape[1]
    params = leafy.run("sequence").params
    weighted = (random_weights(params) * params).sum((0, 2))
    gradient = torch.zeros(length)
    for t in range(length):
        if not params.requires_grad:
            break
        grads = torch.autograd.grad(weighted[t], states, retain_graph=True, allow_unused=True)
        gradient[t] = sum(float(grad[:, 0].square().sum()) for grad in grads if grad is not None) ** 0.5
    nowhere = torch.zeros(probe.steps.shape, dtype=torch.bool)
    influence = _influence(probe, nowhere, torch.ones(len(nowhere), dtype=torch.bool))
    return HorizonCurve("memory state", length, _floats(gradient), _floats(influence))


@torch.no_grad()
def _influence(probe: Probe, where: Tensor, rows: Tensor) -> Tensor:
    """Return the relative change of each step's parameters after a change of the first observation or state, [L]."""
    before, after = probe.run("step").params, probe.disturbed(where, is_state=rows).run("step").params
    return (before - after).abs().amax((0, 2)) / before.abs().max().clamp_min(TINY)


def _judge_reach(curve: HorizonCurve) -> Finding:
    nearest = 1 if curve.leaf == "observation" else 0  # the present observation needs no memory
    is_seen = [lag for lag, change in enumerate(curve.influence) if change > SEEN and lag >= nearest]
    if not is_seen:
        return skip(REACH, "Nothing that was seen or stored before changes the policy's actions: it has no memory yet.")
    broken = [lag for lag in is_seen if not curve.gradient[lag] > 0]
    reach = broken[0] - 1 if broken else max(lag for lag, size in enumerate(curve.gradient) if size > 0)
    reach, needed = max(reach, 0), is_seen[-1]
    if not broken:
        text = f"The gradient reaches {reach} steps back, as far as chunks of {curve.chunk_length} promise."
        return Finding(REACH, float(reach), float(needed), "passed", text)
    return Finding(
        REACH,
        float(reach),
        float(needed),
        "failed",
        f"Actions depend on the {curve.leaf} {needed} steps back, but the gradient ends {reach} steps back: "
        "a .detach(), a no_grad block or shuffled single steps cut it.",
        "Let the state flow through the sequence undetached; detach at chunk edges alone.",
    )


def _report_noise(curve: HorizonCurve) -> Finding:
    largest = max(curve.gradient)
    above = [lag for lag, size in enumerate(curve.gradient) if largest > 0 and size > NOISE * largest]
    text = f"Steps back at which the gradient to the {curve.leaf} is above {NOISE:g} of its largest."
    return inform(ABOVE_NOISE, float(above[-1]) if above else 0.0, text)


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.detach().double().tolist())
