"""Events in the middle of an episode that must not disturb memory: an update of parameters, and an evaluation."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from cyborg_torchrl.checks.findings import Finding, judge, skip
from cyborg_torchrl.checks.leaks import EXACT
from cyborg_torchrl.checks.policy_under_test import with_state
from cyborg_torchrl.checks.probe import Probe, distance
from cyborg_torchrl.checks.rollout import Rollout

CHANGE, EVALUATION = "state after a parameter change", "evaluation in between"
CHANGED = 1e-6
"""Relative change of the parameters: too small to matter, and enough to invalidate a cache."""
LOST = 0.1
"""Largest effect of the change, as a share of the effect of losing the memory."""


@torch.no_grad()
def check_parameter_change(probe: Probe, rollout: Rollout) -> Finding:
    """Check that an episode keeps its memory after a change of parameters. No resets inside."""
    tested, half = probe.tested, probe.steps.shape[1] // 2
    head, tail = probe.steps[:, :half], probe.steps[:, half:]
    expected = _continue(probe, head, tail)
    states = tested.run_steps(head).states[-1]
    fresh = {
        key: rollout.fresh_state[key].expand_as(value).to(value.device, value.dtype) for key, value in states.items()
    }
    power = distance(expected, tested.run_steps(with_state(tail, fresh)).params)
    if power <= 10 * EXACT:
        return skip(CHANGE, "The outputs hardly depend on the memory, so a lost state would not show.")
    tested.run_steps(head)
    with tested.changing_parameters() as parameters:
        for parameter in parameters:
            parameter.mul_(1 + CHANGED)
        changed = tested.run_steps(with_state(tail, states)).params
    return judge(
        CHANGE,
        distance(expected, changed) / power,
        LOST,
        passed="Memory survives a change of parameters in the middle of an episode.",
        failed="After a tiny change of parameters the episode goes on as if its memory had been lost: a cache is "
        "dropped, or the state is not in the tensors that are handed over.",
        cure="Carry the memory in the state, and rebuild caches from it.",
    )


@torch.no_grad()
def check_evaluation(probe: Probe, rollout: Rollout) -> Finding:
    """Check that an evaluation in the middle of an episode changes nothing in it. No resets inside."""
    tested, half = probe.tested, probe.steps.shape[1] // 2
    head, tail = probe.steps[:, :half], probe.steps[:, half:]
    expected = _continue(probe, head, tail)
    states = tested.run_steps(head).states[-1]
    with tested.evaluating():
        tested.run_steps(_episode(probe, rollout))
    after = tested.run_steps(with_state(tail, states)).params
    return judge(
        EVALUATION,
        distance(expected, after),
        EXACT,
        passed="An evaluation in between changes nothing in the episode that was under way.",
        failed="After an evaluation the interrupted episode goes on differently: the evaluation overwrote a state or "
        "running statistics that training uses.",
        cure="Give the evaluation its own states and its own copy of the statistics, and do not update them there.",
    )


def _continue(probe: Probe, head: TensorDictBase, tail: TensorDictBase) -> Tensor:
    """Return the outputs of the tail [B, L, P] in an episode that nothing interrupts."""
    return probe.tested.run_steps(with_state(tail, probe.tested.run_steps(head).states[-1])).params


def _episode(probe: Probe, rollout: Rollout) -> TensorDictBase:
    """Return an episode of two other environments, with other observations."""
    where = torch.ones(probe.steps.shape, dtype=torch.bool)
    other = probe.disturbed(where, is_state=torch.zeros(len(where), dtype=torch.bool)).steps[:2].clone()
    flags = torch.zeros_like(other.get(probe.tested.is_init_key))
    flags[:, 0] = True
    other.set(probe.tested.is_init_key, flags)
    fresh = {key: value.expand(2, *value.shape) for key, value in rollout.fresh_state.items()}
    return with_state(other, fresh)
