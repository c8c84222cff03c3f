"""Search for the cause of log-probs that disagree: each suspicion is tested against the rollout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
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
STATE_SHIFTED = Suspicion(
    DIFFER + "they fit the states that are stored with a neighbouring step, so states are off by one.",
    "Store the state before the step, and copy it before the next step overwrites it.",
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
    states = tested.states_of(rollout.steps).values()
    if all(bool((value == value[:1, :1]).all()) for value in states):
        return ZEROED
    for by in (1, -1):
        for entries, suspicion in ((tested.input_keys, SHIFTED), (tested.state_keys, STATE_SHIFTED)):
            other = _rolled(rollout.steps, entries, by, dim=1)
            if float(_share(tested, other, rollout.steps, tolerance).mean()) >= SHARE:
                return suspicion
    steps = rollout.steps[:MAX_ENVS]
    for by in range(1, steps.shape[0]):
        other = _rolled(steps, tested.state_keys, by, dim=0)
        if bool((_share(tested, other, steps, tolerance) >= SHARE).any()):
            return SWAPPED
    return UNKNOWN


def _rolled(steps: TensorDictBase, entries: Iterable[NestedKey], by: int, *, dim: int) -> TensorDictBase:
    """Return a copy with some entries of other environments (dim 0) or of other steps (dim 1)."""
    other = steps.clone()
    for key in entries:
        other.set(key, steps.get(key).roll(by, dim))
    return other


def _share(tested: PolicyUnderTest, other: TensorDictBase, steps: TensorDictBase, tolerance: float) -> Tensor:
    """Return the share of the steps of each environment whose recorded log-probs fit, [N], without the edges."""
    error = (tested.step_from(other)[0] - tested.recorded_score(steps)).abs().amax(-1)[:, 1:-1]
    return (error <= tolerance).float().mean(1)
