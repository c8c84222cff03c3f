"""Resets at the wrong step, and resets of some environments that mix up the others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cyborg_torchrl.checks.findings import Finding, judge, skip
from cyborg_torchrl.checks.leaks import EXACT, MODES
from cyborg_torchrl.checks.probe import Probe, distance
from cyborg_torchrl.checks.rollout import Rollout

TIMING, PARTIAL = "reset timing", "partial reset"


@torch.no_grad()
def check_reset_timing(probe: Probe, rollout: Rollout) -> list[Finding]:
    """Find the step at which memory restarts, from the steps that still feel the past. The probe has no resets."""
    at = probe.steps.shape[1] // 2
    rows = torch.ones(probe.steps.shape[0], dtype=torch.bool)
    flagged = _with_reset(probe, rollout, at, rows)
    return [_timing(mode, probe, flagged, rollout, at) for mode in MODES]


def _timing(mode: str, probe: Probe, flagged: Probe, rollout: Rollout, at: int) -> Finding:
    name = f"{TIMING}: {mode} mode"
    past, present = _at(probe, slice(0, at - 1)), _at(probe, slice(at, at + 1))

    def feels(where: Probe, changed: Tensor, step: int) -> bool:
        """Return whether outputs at a step change with the observations at `changed`, and with the past's state."""
        rows = torch.full((where.steps.shape[0],), changed is past)
        runs = [_first_state_only(each, rollout).run(mode) for each in (where, where.disturbed(changed, is_state=rows))]
        return distance(runs[0].params, runs[1].params, _at(where, slice(step, step + 1))) > EXACT

    if not (feels(probe, past, at - 1) and feels(probe, present, at + 1)):
        return skip(name, "Without a reset a step feels nothing of the step before, so a reset would not show.")
    is_leaking, is_leaking_next = feels(flagged, past, at), feels(flagged, past, at + 1)
    if is_leaking and is_leaking_next:
        return skip(name, "Memory does not restart at all: see the findings on reset leaks.")
    offset = 0
    if is_leaking or not feels(flagged, present, at + 1):
        offset = 1
    elif not feels(flagged, past, at - 1):
        offset = -1
    finding = judge(
        name,
        float(abs(offset)),
        0.0,
        passed="Memory restarts at the first step of an episode.",
        failed=f"Memory restarts one step {'late' if offset > 0 else 'early'}: the flag of another step is applied.",
        cure="Restart memory before the step whose observation is the first of an episode. A 'done' flag belongs to "
        "the step after it.",
    )
    return replace(finding, value=float(offset))


@torch.no_grad()
def check_partial_reset(probe: Probe, rollout: Rollout) -> list[Finding]:
    """Check that environments keep their own memory if only one of them restarts. The probe has no resets.

    After the reset all rows see the same observations. So the outputs of a row tell whose memory it has.
    """
    at = probe.steps.shape[1] // 2
    rows = torch.arange(probe.steps.shape[0]) == 1
    flagged = _with_reset(probe, rollout, at, rows)
    steps = flagged.steps.clone()
    for key in probe.tested.input_keys:
        value = steps.get(key).clone()
        value[:, at:] = value[:1, at:]
        steps.set(key, value)
    return [_partial(mode, replace(flagged, steps=steps), at, rows) for mode in MODES]


def _partial(mode: str, probe: Probe, at: int, rows: Tensor) -> Finding:
    name = f"{PARTIAL}: {mode} mode"
    together = probe.run(mode).params
    count = together.shape[0]
    singles = [replace(probe, steps=probe.steps[row : row + 1]).run(mode).params for row in range(count)]
    alone = torch.cat(singles)
    where = torch.zeros(1, together.shape[1], dtype=torch.bool)
    where[:, at] = True
    fits = [
        [distance(alone[other : other + 1], together[row : row + 1], where) <= 10 * EXACT for other in range(count)]
        for row in range(count)
    ]
    if count < 3 or all(all(fit) for fit in fits):
        return skip(name, "Environments cannot be told apart by their memory here.")
    swapped = [row for row in range(count) if not rows[row] and not fits[row][row] and any(fits[row])]
    return judge(
        name,
        float(len(swapped)),
        0.0,
        passed="Environments keep their own memory while another one restarts.",
        failed="After a reset of one environment others have the memory of their neighbours: states were put together "
        "in another order.",
        cure="Write fresh states into the rows that restart (torch.where over a mask), and leave the order alone.",
    )


def _with_reset(probe: Probe, rollout: Rollout, at: int, rows: Tensor) -> Probe:
    """Return a copy in which an episode of the rows [B] begins at a step."""
    steps = probe.steps.clone()
    flags = steps.get(probe.tested.is_init_key).clone()
    flags[rows, at] = True
    steps.set(probe.tested.is_init_key, flags)
    for key in probe.tested.state_keys:
        value = steps.get(key).clone()
        value[rows, at:] = rollout.fresh_state[key].to(value.dtype)
        steps.set(key, value)
    return replace(probe, steps=steps, first_reset=torch.where(rows, at, probe.first_reset))


def _at(probe: Probe, steps: slice) -> Tensor:
    where = torch.zeros(probe.steps.shape, dtype=torch.bool)
    where[:, steps] = True
    return where


def _first_state_only(probe: Probe, rollout: Rollout) -> Probe:
    """Return a copy with fresh states after the first step, since some modules read the state of each reset."""
    steps = probe.steps.clone()
    for key in probe.tested.state_keys:
        value = steps.get(key).clone()
        value[:, 1:] = rollout.fresh_state[key].to(value.dtype)
        steps.set(key, value)
    return replace(probe, steps=steps)
