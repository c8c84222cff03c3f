"""Memory used by stored states."""

from __future__ import annotations

from cyborg_torchrl.checks.findings import Finding, inform
from cyborg_torchrl.checks.policy_under_test import PolicyUnderTest
from cyborg_torchrl.checks.rollout import Rollout

STEPS = 100_000
MEGABYTE = 1e6
EVERY_STEP = "states, MB per 100,000 steps: each step stored"


def stored_state_name(length: int) -> str:
    """Return the name of the finding for one state a chunk."""
    return f"states, MB per 100,000 steps: one a chunk of {length}"


def report_storage(tested: PolicyUnderTest, rollout: Rollout, length: int) -> list[Finding]:
    """Report the megabytes (10^6 bytes) of states, stored at each step and once a chunk."""
    states = tested.states_of(rollout.steps).values()
    size = sum(value[0, 0].numel() * value.element_size() for value in states)
    every = f"{size} bytes a state; a TorchRL rollout holds it a second time under 'next'."
    once = "For a buffer that stores the state before each chunk and replays the rest."
    return [
        inform(EVERY_STEP, size * STEPS / MEGABYTE, every),
        inform(stored_state_name(length), size * STEPS / length / MEGABYTE, once),
    ]
