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
MAX_COLUMNS = 32
"""Number of outputs that are tested for a gradient in step mode; further ones are assumed to have one."""


def check_gradients(probe: Probe, tolerance: float) -> Finding:
    """Compare gradients to parameters, observations and first states, on a probe with resets.

    A backward pass of a scan or a kernel may be wrong although its outputs are right. So sequence mode, as it is
    trained, is compared with a loop of step mode in float64. If the policy cannot run in float64, the loop runs as
    the policy is.
    """
    if not probe.tested.has_gradient:
        return skip(SAME_GRADIENT, "The policy computes no gradients.")
    reference, expected, columns = _reference(probe)
    if not bool(columns.any()):
        return skip(SAME_GRADIENT, "Step mode has no gradient, so there is nothing to compare with.")
    sequence, params, _ = _gradients(probe, "sequence", columns)
    if not any(bool(gradient.any()) for gradient in sequence):
        return skip(SAME_GRADIENT, "Sequence mode has no gradient at all: see the gradient horizon.")
    limit = max(LIMIT, 10 * tolerance)
    if distance(expected, params) > limit:
        return skip(SAME_GRADIENT, "The outputs of the two modes differ already: see 'step against sequence'.")
    largest = max(float(torch.linalg.vector_norm(gradient)) for gradient in reference)
    # A gradient that is almost zero, compared with the others, consists of rounding errors.
    errors = [
        float(torch.linalg.vector_norm(mine.double() - right.double()))
        / max(float(torch.linalg.vector_norm(right)), 1e-3 * largest, TINY)
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


def _reference(probe: Probe) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return gradients, outputs and their columns with a gradient, of steps in float64 or the policy's precision."""
    try:
        with probe.tested.in_float64() as tested:
            return _gradients(replace(probe, tested=tested, steps=_double(probe.steps)), "step")
    except (RuntimeError, TypeError, ValueError):  # a constant or a kernel of the policy is in float32
        return _gradients(probe, "step")


def _gradients(probe: Probe, mode: str, columns: Tensor | None = None) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the gradients of a random combination of some columns of the outputs, [P] bool; None: all that have one.

    Acting often computes a part of the outputs without gradients, and that part cannot be compared.
    """
    leafy, observations, states = probe.with_gradient()
    leaves = [*leafy.tested.parameters(), *observations, *states]
    params = leafy.run(mode).params

    def gradients(weight: Tensor) -> list[Tensor]:
        found = torch.autograd.grad((weight * params).sum(), leaves, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]

    if not params.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves], params, torch.zeros(params.shape[-1], dtype=torch.bool)
    if columns is None:
        columns = torch.ones(params.shape[-1], dtype=torch.bool, device=params.device)
        for column in range(min(params.shape[-1], MAX_COLUMNS)):
            alone = torch.zeros_like(columns)
            alone[column] = True
            columns[column] = any(bool(grad.any()) for grad in gradients(random_weights(params) * alone))
    found = gradients(random_weights(params) * columns)
    for index in range(len(leaves) - len(states), len(leaves)):
        found[index] = found[index][:, 0]  # the states at resets come from the environment
    return found, params.detach(), columns


def _double(steps: TensorDictBase) -> TensorDictBase:
    return steps.apply(lambda value: value.double() if value.is_floating_point() else value)
