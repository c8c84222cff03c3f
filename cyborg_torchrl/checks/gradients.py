"""Gradients of sequence mode, compared with those of a plain loop of steps in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from tensordict import TensorDictBase
from torch import Tensor

from cyborg_torchrl.checks.findings import Finding, judge, skip
from cyborg_torchrl.checks.probe import TINY, Probe, distance, random_weights

SAME_GRADIENT = "gradient: sequence against steps"
LIMIT = 1e-3
"""Relative limit in float32; right backward passes measure about 1e-5."""


def check_gradients(probe: Probe, tolerance: float) -> Finding:
    """Compare gradients to parameters, observations and first states, on a probe with resets.

    A backward pass of a scan or a kernel may be wrong although its outputs are right. So sequence mode, as it is
    trained, is compared with a loop of step mode in float64. If the policy cannot run in float64, the loop runs as
    the policy is.
    """
    if not probe.tested.has_gradient:
        return skip(SAME_GRADIENT, "The policy computes no gradients.")
    sequence, params = _gradients(probe, "sequence")
    if not any(bool(gradient.any()) for gradient in sequence):
        return skip(SAME_GRADIENT, "Sequence mode has no gradient at all: see the gradient horizon.")
    reference, expected = _reference(probe)
    limit = max(LIMIT, 10 * tolerance)
    if distance(expected, params) > limit:
        return skip(SAME_GRADIENT, "The outputs of the two modes differ already: see 'step against sequence'.")
    if not any(bool(gradient.any()) for gradient in reference):
        return skip(SAME_GRADIENT, "Step mode has no gradient, so there is nothing to compare with.")
    largest = max(float(gradient.norm()) for gradient in reference)
    # A gradient that is almost zero, compared with the others, consists of rounding errors.
    errors = [
        float((mine.double() - right.double()).norm()) / max(float(right.norm()), 1e-3 * largest, TINY)
        for mine, right in zip(sequence, reference, strict=True)
    ]
    return judge(
        SAME_GRADIENT,
        max(errors) if all(error == error for error in errors) else float("nan"),
        limit,
        passed="The gradients of sequence mode are those of a loop of steps in float64.",
        failed="Sequence mode gives the right outputs and other gradients than a loop of steps: its backward pass is "
        "wrong.",
        cure="Compare the backward pass with torch.autograd.gradcheck, and train through a plain loop meanwhile.",
    )


def _reference(probe: Probe) -> tuple[list[Tensor], Tensor]:
    """Return gradients and outputs of a loop of steps in float64, or in the policy's own precision."""
    try:
        with probe.tested.in_float64() as tested:
            return _gradients(replace(probe, tested=tested, steps=_double(probe.steps)), "step")
    except (RuntimeError, TypeError, ValueError):  # a constant or a kernel of the policy is in float32
        return _gradients(probe, "step")


def _gradients(probe: Probe, mode: str) -> tuple[list[Tensor], Tensor]:
    leafy, observations, states = probe.with_gradient()
    leaves = [*leafy.tested.parameters(), *observations, *states]
    params = leafy.run(mode).params
    if not params.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves], params
    loss = (random_weights(params) * params).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]
    for index in range(len(leaves) - len(states), len(leaves)):
        gradients[index] = gradients[index][:, 0]  # the states at resets come from the environment
    return gradients, params.detach()


def _double(steps: TensorDictBase) -> TensorDictBase:
    return steps.apply(lambda value: value.double() if value.is_floating_point() else value)
