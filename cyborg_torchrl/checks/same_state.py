"""Log-probs and states of a rollout, recomputed: does the update see the same as the rollout?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from cyborg_torchrl import keys
from cyborg_torchrl.checks.causes import Suspicion, suspect
from cyborg_torchrl.checks.findings import Finding, inform, judge, skip
from cyborg_torchrl.checks.policy_under_test import PolicyUnderTest
from cyborg_torchrl.checks.probe import TINY
from cyborg_torchrl.checks.rollout import Rollout
from cyborg_torchrl.data import RecurrentRolloutBuffer
from cyborg_torchrl.data.chunks import ceil_div

SINGLE, WHOLE, CONTINUITY, POWER = (
    "same state: single steps",
    "same state: whole rows",
    "states follow one another",
    "same state: what a wrong state would show",
)
AS_RECORDED = "The log-probs recomputed from the stored states equal those of the rollout."


@torch.no_grad()
def check_same_state(
    tested: PolicyUnderTest, rollout: Rollout, chunk_lengths: Sequence[int], tolerance: float
) -> list[Finding]:
    """Measure |log ratio| before any update: it is zero if and only if the update sees the same as the rollout."""
    steps = rollout.steps
    total = steps.shape[1]
    single_score, following = tested.step_from(steps)
    errors = {SINGLE: (single_score - tested.recorded_score(steps)).abs()}
    shorter = sorted({length for length in chunk_lengths if length < total})
    for length in shorter:
        errors[f"same state: chunks of {length}"] = _chunk_errors(tested, steps, length)
    errors[WHOLE] = _chunk_errors(tested, steps, total)
    for length in shorter:
        if length > 1 and total % length == 0 and tested.is_init_key == keys.IS_INIT:
            name = f"same state: RecurrentRolloutBuffer, seq_len {length}"
            errors[name] = _buffer_errors(tested, steps, length)
    follow = _continuity(tested, rollout, following)
    power = _power(tested, steps)
    is_wrong = {name: not float(error.max()) <= tolerance for name, error in errors.items()}
    suspicion = suspect(tested, rollout, tolerance, follow, is_wrong[SINGLE]) if any(is_wrong.values()) else None
    findings = [_ratio_finding(name, float(e.max()), tolerance, power, suspicion) for name, e in errors.items()]
    text = "|log ratio| with the states of another moment: where it is far above the limit, the check sees."
    return [*findings, _judge_continuity(follow, tolerance), inform(POWER, power, text)]


def _judge_continuity(follow: float, tolerance: float) -> Finding:
    return judge(
        CONTINUITY,
        follow,
        tolerance,
        passed="Each stored state is the one that the policy makes of the step before.",
        failed="Stored states are not what the policy makes of the step before: steps are out of order, or states "
        "were lost, swapped or made by other parameters.",
        cure="Store whole sequences of one environment in order of time, and states and observations of the same step.",
    )


def _ratio_finding(name: str, error: float, tolerance: float, power: float, suspicion: Suspicion | None) -> Finding:
    if error <= tolerance and power <= tolerance:
        text = "The log-probs hardly depend on the memory, so a wrong state would not show: train the policy a bit."
        return skip(name, text, value=error, limit=tolerance)
    cause = suspicion or Suspicion("", "")
    return judge(name, error, tolerance, passed=AS_RECORDED, failed=cause.explanation, cure=cause.cure)


def _chunk_errors(tested: PolicyUnderTest, steps: TensorDictBase, length: int) -> Tensor:
    """Return |log ratio| of all steps, in chunks from their first stored state; the last chunk may be shorter."""
    total = steps.shape[1]
    whole = total - total % length
    parts = [steps[:, :whole].reshape(-1, length)] + ([steps[:, whole:]] if whole < total else [])
    return torch.cat([_ratio_error(tested, part).flatten() for part in parts])


def _buffer_errors(tested: PolicyUnderTest, steps: TensorDictBase, length: int) -> Tensor:
    rows = steps.numel() // length
    buffer = RecurrentRolloutBuffer(steps.numel(), length, batch_size=ceil_div(rows, 3), state_keys=tested.state_keys)
    with torch.random.fork_rng():
        buffer.store(steps)
        device = tested.recorded_score(steps).device
        return torch.cat([_ratio_error(tested, batch.to(device)).flatten() for batch in buffer])


def _ratio_error(tested: PolicyUnderTest, steps: TensorDictBase) -> Tensor:
    run = tested.run_sequence(steps)
    return (tested.score(run.params, run.dist, steps) - tested.recorded_score(steps)).abs()


def _continuity(tested: PolicyUnderTest, rollout: Rollout, following: Mapping) -> float:
    """Return the largest relative difference between a stored state and the one computed from the step before."""
    continues = ~rollout.steps.get(tested.is_init_key).squeeze(-1)[:, 1:]
    worst = 0.0
    for key, stored in tested.states_of(rollout.steps).items():
        made, stored = following[key][:, :-1][continues], stored[:, 1:][continues]
        if made.numel():
            error = (made - stored).abs().max() / torch.maximum(made.abs().max(), stored.abs().max()).clamp_min(TINY)
            worst = max(worst, float(error)) if float(error) == float(error) else float("inf")
    return worst


def _power(tested: PolicyUnderTest, steps: TensorDictBase) -> float:
    """Return the largest |log ratio| of single steps with the states of another environment and step."""
    other = steps.clone()
    for key in tested.state_keys:
        value = steps.get(key)
        other.set(key, value.flatten(0, 1).roll(value.shape[1] // 2 + 1, 0).view_as(value))
    return float((tested.step_from(other)[0] - tested.step_from(steps)[0]).abs().max())
