"""Leaks over a reset or between environments; and whether outputs repeat and both modes agree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cyborg_torchrl.checks.findings import Finding, judge, skip
from cyborg_torchrl.checks.probe import Probe, distance

EXACT = 1e-5
"""Relative limit; another order of summation already changes about 1e-6."""
MODES = ("step", "sequence")
REPEATABLE, SAME_MODES = "repeatable", "step against sequence"
ALONE = "environments alone and together"


@torch.no_grad()
def check_repeatable(probe: Probe) -> Finding:
    """Check that the same input gives the same distribution twice."""
    error = max(distance(probe.run(mode).params, probe.run(mode).params) for mode in MODES)
    return judge(
        REPEATABLE,
        error,
        EXACT,
        passed="The same input gives the same distribution twice.",
        failed="The same input gives another distribution the second time: dropout or noise is on, or the module "
        "keeps a state outside the tensordict.",
        cure="Call policy.eval() or drop the noise, and keep memory under the state keys alone.",
    )


@torch.no_grad()
def check_modes(probe: Probe, tolerance: float) -> Finding:
    """Compare the distribution parameters of both modes, from the same states and with resets."""
    return judge(
        SAME_MODES,
        distance(probe.run("step").params, probe.run("sequence").params),
        tolerance,
        passed="Sequence mode gives what step mode gives, step by step.",
        failed="Sequence mode gives other distributions than the same steps one by one: it starts from another "
        "state, restarts elsewhere, or does not carry memory along the sequence.",
        cure="Make the sequence a loop of the step from the first step's stored state first; then make it fast.",
    )


def check_reset_leak(probe: Probe) -> list[Finding]:
    """Check that nothing before a reset changes anything after it."""
    before = probe.is_before
    rows = probe.first_reset < probe.steps.shape[1]
    texts = {
        "passed": "Steps before a reset change nothing after it.",
        "failed": "Steps before a reset change the steps after it: memory is not restarted where an episode begins.",
        "cure": f"Replace the state by the initial state wherever {probe.tested.is_init_key!r} is true, inside "
        "sequences too.",
    }

    def look(rows: Tensor) -> list[Finding]:
        where, after = before & rows.unsqueeze(1), ~before & rows.unsqueeze(1)
        return [
            *(_disturb("reset", mode, probe, where, rows, after=after, texts=texts) for mode in MODES),
            *(_gradient("reset gradient", mode, probe, where, after, texts) for mode in MODES),
        ]

    found = look(rows)
    if all(finding.verdict != "failed" for finding in found):
        return found
    # Rows restart at different steps, so a leak between environments also shows here. Repeat the check for each row.
    alone = [look(torch.arange(len(rows)) == row) for row in rows.nonzero().flatten().tolist()]
    return [max(same, key=lambda finding: finding.verdict == "failed") for same in zip(*alone, strict=True)]


def check_environment_leak(probe: Probe, tolerance: float) -> list[Finding]:
    """Check that environments do not share memory."""
    batch, length = probe.steps.shape
    first = torch.zeros(batch, dtype=torch.bool)
    first[0] = True
    inside, outside = (mask.unsqueeze(1).expand(batch, length) for mask in (first, ~first))
    texts = {
        "passed": "An environment changes nothing in the others.",
        "failed": "An environment changes the outputs of the others: states are sliced along the wrong dimension, or "
        "something is computed over the batch.",
        "cure": "Keep states batch first, and normalise over features (LayerNorm), not over the batch.",
    }
    return [
        *(_disturb("environment", mode, probe, inside, first, after=outside, texts=texts) for mode in MODES),
        *(_gradient("environment gradient", mode, probe, inside, outside, texts) for mode in MODES),
        _alone(probe, tolerance, texts),
    ]


def _disturb(
    kind: str, mode: str, probe: Probe, where: Tensor, rows: Tensor, *, after: Tensor, texts: dict[str, Any]
) -> Finding:
    """Change observations at `where` and the states of `rows`, and check that outputs at `after` do not change."""
    name = f"{kind} leak: {mode} mode"
    with torch.no_grad():
        original = probe.run(mode).params
        changed = probe.disturbed(where, is_state=rows).run(mode).params
    if distance(original, changed, where) <= EXACT:
        return skip(name, "Other observations and states change nothing even where they should.", limit=EXACT)
    return judge(name, distance(original, changed, after), EXACT, **texts)


def _gradient(kind: str, mode: str, probe: Probe, where: Tensor, after: Tensor, texts: dict[str, Any]) -> Finding:
    """Check that the gradient of outputs at `after` to observations and states at `where` is exactly zero."""
    name = f"{kind} leak: {mode} mode"
    leafy, observations, states = probe.with_gradient()
    params = leafy.run(mode).params
    if not params.requires_grad:
        return skip(name, "The outputs have no gradient at all here.", limit=0.0)
    weight = torch.randn(params.shape, generator=probe.generator).to(params.device)
    leaves = [*observations, *states]
    grads = torch.autograd.grad((weight * params)[after.to(params.device)].sum(), leaves, allow_unused=True)
    found = [grad[where.to(grad.device)] for grad in grads if grad is not None]
    largest = max((float(grad.abs().max()) for grad in found if grad.numel()), default=0.0)
    is_number = all(bool(grad.isfinite().all()) for grad in found)
    return judge(name, largest if is_number else float("nan"), 0.0, **texts)


@torch.no_grad()
def _alone(probe: Probe, tolerance: float, texts: dict[str, Any]) -> Finding:
    together = probe.run("sequence").params
    rows = range(min(3, probe.steps.shape[0]))
    alone = torch.cat([probe.tested.run_sequence(probe.steps[row : row + 1]).params for row in rows])
    return judge(ALONE, distance(together[: len(rows)], alone), tolerance, **texts)
