"""All checks of a policy and a rollout, in the order in which their causes are looked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cyborg_torchrl.checks.bootstrap import check_bootstrap
from cyborg_torchrl.checks.consequences import explain
from cyborg_torchrl.checks.findings import Finding
from cyborg_torchrl.checks.gradients import check_gradients
from cyborg_torchrl.checks.horizon import check_horizon
from cyborg_torchrl.checks.interruptions import check_evaluation, check_parameter_change
from cyborg_torchrl.checks.leaks import check_environment_leak, check_modes, check_repeatable, check_reset_leak
from cyborg_torchrl.checks.policy_under_test import PolicyUnderTest
from cyborg_torchrl.checks.probe import build_probe
from cyborg_torchrl.checks.report import DriftCurve, HorizonCurve, Report
from cyborg_torchrl.checks.resets import check_partial_reset, check_reset_timing
from cyborg_torchrl.checks.rollout import Rollout
from cyborg_torchrl.checks.same_state import check_same_state
from cyborg_torchrl.checks.stored_states import report_drift, report_storage

TOLERANCE, REDUCED_TOLERANCE = 1e-4, 3e-2
"""Largest error in float32, and in reduced precision."""
PROBE_LENGTH = 8
"""Steps of the sequences for the leak checks, which take many runs."""
Progress = Callable[[str, float], None]
"""Called with the name of the next check and the share that is done, in [0, 1]."""


def silent(name: str, share: float) -> None:
    """Ignore the progress."""


@dataclass(frozen=True)
class Options:
    """Options of a check, which `check_recurrent` explains.

    Raises:
        ValueError: if there are no chunk lengths, or one below 1.
    """

    chunk_lengths: tuple[int, ...] = (1, 5, 32)
    seed: int = 0
    tolerance: float | None = None
    drift_updates: int = 8
    drift_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if any(length < 1 for length in self.chunk_lengths) or not self.chunk_lengths:
            raise ValueError(f"chunk_lengths must be 1 or more; got {list(self.chunk_lengths)}.")


def run_checks(tested: PolicyUnderTest, rollout: Rollout, options: Options, on_progress: Progress = silent) -> Report:
    """Run all checks of a policy, and return their report."""
    seed, tolerance = options.seed, _tolerance(tested, rollout) if options.tolerance is None else options.tolerance
    longest = min(max(options.chunk_lengths), rollout.steps.shape[1] // 2)
    probe = build_probe(tested, rollout, PROBE_LENGTH, seed)
    unbroken = build_probe(tested, rollout, PROBE_LENGTH, seed, has_resets=False)
    long_probe = build_probe(tested, rollout, longest, seed)
    long_unbroken = build_probe(tested, rollout, longest, seed, has_resets=False)
    horizons: list[HorizonCurve | None] = []
    drifts: list[DriftCurve | None] = []

    def horizon() -> list[Finding]:
        found, curve = check_horizon(long_unbroken)
        horizons.append(curve)
        return found

    def drift() -> list[Finding]:
        found, curve = report_drift(tested, rollout, longest, options.drift_updates, options.drift_learning_rate)
        drifts.append(curve)
        return found

    parts: dict[str, Callable[[], list[Finding]]] = {
        "repeatable": lambda: [check_repeatable(probe)],
        "same state": lambda: check_same_state(tested, rollout, options.chunk_lengths, tolerance),
        "step against sequence": lambda: [check_modes(long_probe, tolerance)],
        "resets": lambda: check_reset_leak(probe),
        "reset timing": lambda: check_reset_timing(unbroken, rollout),
        "environments": lambda: check_environment_leak(probe, tolerance),
        "partial resets": lambda: check_partial_reset(unbroken, rollout),
        "gradient horizon": horizon,
        "gradients": lambda: [check_gradients(probe, tolerance)],
        "bootstrapped values": lambda: check_bootstrap(tested, rollout.bootstraps, rollout.fresh_state, tolerance),
        "interruptions": lambda: [check_evaluation(unbroken, rollout), check_parameter_change(unbroken, rollout)],
        "drift": drift,
        "storage": lambda: report_storage(tested, rollout, longest),
    }
    findings: list[Finding] = []
    for index, (name, check) in enumerate(parts.items()):
        on_progress(name, (index + 1) / (len(parts) + 1))
        findings += check()
    on_progress("done", 1.0)
    names = tuple("/".join(key) if isinstance(key, tuple) else key for key in tested.state_keys)
    found = tuple(explain(findings))
    return Report(tested.name, names, *rollout.steps.shape, seed, found, horizons[0], drifts[0])


def _tolerance(tested: PolicyUnderTest, rollout: Rollout) -> float:
    """Return the largest error that rounding explains."""
    device = rollout.steps.get(tested.is_init_key).device.type
    is_reduced = tested.has_reduced_precision or torch.is_autocast_enabled(device)
    return REDUCED_TOLERANCE if is_reduced else TOLERANCE
