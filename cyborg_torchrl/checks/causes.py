"""Search for the cause of log-probs that disagree: each suspicion is tested against the rollout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor

from cyborg_torchrl.checks.policy_under_test import PolicyUnderTest
from cyborg_torchrl.checks.rollout import Rollout

DIFFER = "The recomputed log-probs differ from those of the rollout: "
MAX_ENVS = 16
SHARE = 0.9
"""Share of the steps that a suspicion must explain; edges and resets spoil some."""


@dataclass(frozen=True)
class Suspicion:
    """A possible cause, and its cure."""

    explanation: str
    cure: str


ZEROED = Suspicion(
    DIFFER + "all stored states are alike, as if memory had been reset or never stored.",
    "Keep the state of each step: the primer on the environment, ('next', key) in the policy's out_keys, and the state "
    "keys in the buffer.",
)
SWAPPED = Suspicion(
    DIFFER + "they fit the states of another environment.",
    "Split and reshape states by environment (batch first), exactly as the observations are.",
)
SHIFTED = Suspicion(
    DIFFER + "they fit the observations of a neighbouring step, so observations are off by one.",
    "Store the observation that the action was chosen on, not the one that followed it.",
)
SHUFFLED = Suspicion(
    DIFFER + "single steps fit, but do not follow one another, so the order of time was lost.",
    "Sample whole chunks of one environment, and never shuffle or flatten steps within them.",
)
SEQUENCE = Suspicion(
    DIFFER + "single steps fit and follow one another, so the policy's sequence mode is not its step mode.",
    "See the findings on resets and on step against sequence: one of the two modes is wrong.",
)
UNKNOWN = Suspicion(
    DIFFER + "neither neighbouring observations nor other environments' states fit; other parameters, other "
    "observations (normalised differently?) or dropout were at work when the agent acted.",
    "Check the policy as it was when it acted, with the observations it acted on.",
)


def suspect(
    tested: PolicyUnderTest, rollout: Rollout, tolerance: float, discontinuity: float, is_single_wrong: bool
) -> Suspicion:
    """Return the likeliest cause of a log-ratio that is not zero."""
    if not is_single_wrong:
        return SHUFFLED if discontinuity > tolerance else SEQUENCE
    tries: list[tuple[Suspicion, Callable[[PolicyUnderTest, TensorDictBase, float], bool]]] = [
        (SHIFTED, _fits_shifted),
        (SWAPPED, _fits_swapped),
    ]
    if _are_alike(tested, rollout):
        return ZEROED
    for cause, fits in tries:
        if fits(tested, rollout.steps, tolerance):
            return cause
    return UNKNOWN


def _are_alike(tested: PolicyUnderTest, rollout: Rollout) -> bool:
    states = tested.states_of(rollout.steps).values()
    return all(bool((value == value[:1, :1]).all()) for value in states)


def _fits_shifted(tested: PolicyUnderTest, steps: TensorDictBase, tolerance: float) -> bool:
    return any(_fits(tested, _shift(tested, steps, by), steps, tolerance) for by in (1, -1))


def _fits_swapped(tested: PolicyUnderTest, steps: TensorDictBase, tolerance: float) -> bool:
    """Return whether the log-probs of an environment fit the states of another one."""
    steps = steps[:MAX_ENVS]
    fitting = torch.zeros(steps.shape[0], dtype=torch.bool)
    for by in range(1, steps.shape[0]):
        other = steps.clone()
        for key in tested.state_keys:
            other.set(key, steps.get(key).roll(by, 0))
        fitting |= _share(tested, other, steps, tolerance).cpu() >= SHARE
    return bool(fitting.any())


def _shift(tested: PolicyUnderTest, steps: TensorDictBase, by: int) -> TensorDictBase:
    other = steps.clone()
    for key in tested.input_keys:
        other.set(key, steps.get(key).roll(by, 1))
    return other


def _fits(tested: PolicyUnderTest, other: TensorDictBase, steps: TensorDictBase, tolerance: float) -> bool:
    return float(_share(tested, other, steps, tolerance).mean()) >= SHARE


def _share(tested: PolicyUnderTest, other: TensorDictBase, steps: TensorDictBase, tolerance: float) -> Tensor:
    """Return the share of the steps of each environment whose recorded log-probs fit, [N], without the edges."""
    error = (tested.step_from(other)[0] - tested.recorded_log_prob(steps)).abs()[:, 1:-1]
    return (error <= tolerance).float().mean(1)
