"""Bootstrapped values: were they computed with the memory of the episode?"""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from cyborg_torchrl.checks.findings import Finding, judge, skip
from cyborg_torchrl.checks.policy_under_test import PolicyUnderTest, States
from cyborg_torchrl.checks.probe import TINY
from cyborg_torchrl.checks.rollout import Bootstraps

BOOTSTRAP = "bootstrapped values"


@torch.no_grad()
def check_bootstrap(
    tested: PolicyUnderTest, bootstraps: Bootstraps | None, fresh_state: States, tolerance: float
) -> list[Finding]:
    """Recompute the values with the memory after each step, and with a restarted memory; nothing without values."""
    return [] if bootstraps is None else [_check(tested, bootstraps, fresh_state, tolerance)]


def _check(tested: PolicyUnderTest, bootstraps: Bootstraps, fresh_state: States, tolerance: float) -> Finding:
    carried = tested.step_from(bootstraps.steps)[1]
    right = _values(tested, bootstraps.following, carried, is_first=False)
    fresh = {key: fresh_state[key].expand_as(value).to(value.device, value.dtype) for key, value in carried.items()}
    restarted = _values(tested, bootstraps.following, fresh, is_first=True)
    if right is None or restarted is None:
        return skip(BOOTSTRAP, "The policy gives no value estimate.")
    scale = float(right.abs().max().clamp_min(TINY))
    error = float((bootstraps.value - right).abs().max()) / scale
    if float((right - restarted).abs().max()) / scale <= tolerance:
        return skip(
            BOOTSTRAP, "The values hardly depend on the memory, so a restarted one would not show.", value=error
        )
    is_restarted = float((bootstraps.value - restarted).abs().max()) / scale <= tolerance
    cause = "a restarted memory" if is_restarted else "another memory, other observations or other parameters"
    return judge(
        BOOTSTRAP,
        error,
        tolerance,
        passed="Bootstrapped values use the memory of the episode that they continue.",
        failed=f"The values behind the last steps fit {cause}, so the advantages before them are wrong.",
        cure="Compute the value of the next observation from the state after the step, without a reset, and use it "
        "where this step did not terminate the episode.",
    )


def _values(tested: PolicyUnderTest, following: TensorDictBase, states: States, *, is_first: bool) -> Tensor | None:
    work = following.select(*tested.input_keys)
    work.set(tested.is_init_key, torch.full((*work.shape, 1), is_first, device=work.device))
    return tested.value(work.update(TensorDict(states, work.batch_size)))
