"""`check_recurrent`: all checks of a recurrent policy in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torchrl.envs import EnvBase

from cyborg_torchrl import keys
from cyborg_torchrl.checks.findings import Finding
from cyborg_torchrl.checks.horizon import check_horizon
from cyborg_torchrl.checks.leaks import check_environment_leak, check_modes, check_repeatable, check_reset_leak
from cyborg_torchrl.checks.policy_under_test import PolicyUnderTest
from cyborg_torchrl.checks.probe import build_probe
from cyborg_torchrl.checks.report import HorizonCurve, Report
from cyborg_torchrl.checks.rollout import Rollout, collect, prepare
from cyborg_torchrl.checks.same_state import check_same_state
from cyborg_torchrl.checks.stored_states import report_drift, report_storage
from cyborg_torchrl.modules.encoders import Autocast

TOLERANCE, REDUCED_TOLERANCE = 1e-4, 3e-2
"""Largest error in float32, and in reduced precision."""
PROBE_LENGTH = 8
"""Steps of the sequences for the leak checks, which take many runs."""


def check_recurrent(
    policy: TensorDictModuleBase,
    env: EnvBase | None = None,
    *,
    rollout: TensorDictBase | None = None,
    steps: int = 64,
    chunk_lengths: Sequence[int] = (1, 5, 32),
    seed: int = 0,
    state_keys: Sequence[NestedKey] | None = None,
    is_init_key: NestedKey = keys.IS_INIT,
    tolerance: float | None = None,
    drift_updates: int = 8,
    drift_learning_rate: float = 1e-3,
    on_progress: Callable[[str, float], None] = lambda name, share: None,
) -> Report:
    """Check that training a recurrent policy on sequences uses the memory that the policy acted with.

    The checks run on a copy of the policy, in its present train/eval mode.

    Args:
        policy: any module with `get_dist` that obeys `torchrl.modules.set_recurrent_mode`: a `PPOAgent`, a
            `ProbabilisticActor` over a `GRUModule`, or a policy you wrote.
        env: the environment to collect a rollout from, with `InitTracker` and the policy's primers. It is seeded, and
            can be used afterwards.
        rollout: consecutive steps [N, T] from your collector or buffer, if there is no `env`.
        steps: T, steps of each environment in the collected rollout.
        chunk_lengths: lengths of the chunks in which the rollout is evaluated. The gradient horizon uses the longest.
        seed: seed of the rollout and of all perturbations.
        state_keys: entries of the memory state; None: keys that are read, and written under "next", and those of the
            policy's primers.
        is_init_key: flag of an episode's first step.
        tolerance: largest |log ratio| and relative error that passes. None: 1e-4, or 3e-2 under
            `torch.autocast` and with an encoder in reduced precision.
        drift_updates: number of optimiser updates of a copy before the drift of stored states is reported.
        drift_learning_rate: learning rate of those updates.
        on_progress: called with the name of the next check and the share that is done, in [0, 1].

    Raises:
        ValueError: if there is neither an environment nor a rollout, or the policy has no `get_dist` or no state.
        KeyError: if `is_init`, a state or the log-probs are missing; the message says what to add.

    Examples: see `docs/checker.md`.
    """
    if (env is None) == (rollout is None):
        raise ValueError("give an environment to collect from, or a ready rollout=, and not both.")
    if any(length < 1 for length in chunk_lengths) or not chunk_lengths:
        raise ValueError(f"chunk_lengths must be 1 or more; got {list(chunk_lengths)}.")
    tested = PolicyUnderTest(policy, state_keys, is_init_key)
    on_progress("rollout", 0.0)
    recorded = prepare(tested, collect(tested, env, steps, seed) if rollout is None else rollout)
    drift = (drift_updates, drift_learning_rate)
    limit = _tolerance(tested, recorded) if tolerance is None else tolerance
    return _run(tested, recorded, chunk_lengths, seed, limit, drift, on_progress)


def _tolerance(tested: PolicyUnderTest, rollout: Rollout) -> float:
    """Return the largest error that rounding explains."""
    device = rollout.steps.get(tested.is_init_key).device.type
    has_reduced_part = any(isinstance(module, Autocast) for module in tested.policy.modules())
    return REDUCED_TOLERANCE if has_reduced_part or torch.is_autocast_enabled(device) else TOLERANCE


def _run(
    tested: PolicyUnderTest,
    rollout: Rollout,
    chunk_lengths: Sequence[int],
    seed: int,
    tolerance: float,
    drift: tuple[int, float],
    on_progress: Callable[[str, float], None],
) -> Report:
    longest = min(max(chunk_lengths), rollout.steps.shape[1] // 2)
    probe = build_probe(tested, rollout, PROBE_LENGTH, seed)
    long_probe = build_probe(tested, rollout, longest, seed)
    unbroken = build_probe(tested, rollout, longest, seed, has_resets=False)
    curves: list[HorizonCurve] = []

    def horizon() -> list[Finding]:
        found, curve = check_horizon(unbroken)
        curves.append(curve)
        return found

    parts: dict[str, Callable[[], list[Finding]]] = {
        "repeatable": lambda: [check_repeatable(probe)],
        "same state": lambda: check_same_state(tested, rollout, chunk_lengths, tolerance),
        "step against sequence": lambda: [check_modes(long_probe, tolerance)],
        "resets": lambda: check_reset_leak(probe),
        "environments": lambda: check_environment_leak(probe, tolerance),
        "gradient horizon": horizon,
        "drift": lambda: report_drift(tested, rollout, longest, *drift),
        "storage": lambda: report_storage(tested, rollout, longest),
    }
    findings: list[Finding] = []
    for index, (name, check) in enumerate(parts.items()):
        on_progress(name, (index + 1) / (len(parts) + 1))
        findings += check()
    on_progress("done", 1.0)
    names = tuple("/".join(key) if isinstance(key, tuple) else key for key in tested.state_keys)
    return Report(tested.name, names, *rollout.steps.shape, seed, tuple(findings), curves[0])
