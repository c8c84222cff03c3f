"""Seed faults into sb3-contrib and find them: python -m benchmarks.honesty.seeded.

Each fault replaces a method of the installed package in this process. The adapter then runs as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from sb3_contrib.common.recurrent.buffers import RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

from benchmarks.honesty.sb3_contrib.adapter import check

ADD, SAMPLES = RecurrentRolloutBuffer.add, RecurrentRolloutBuffer._get_samples
VALUES, PROCESS = RecurrentActorCriticPolicy.predict_values, RecurrentActorCriticPolicy._process_sequence
EVALUATE = RecurrentActorCriticPolicy.evaluate_actions


def store_zeros(self: Any, *args: Any, lstm_states: Any, **kwargs: Any) -> None:
    """Store zeros for all states."""
    zeros = [tuple(torch.zeros_like(part) for part in pair) for pair in lstm_states]
    ADD(self, *args, lstm_states=type(lstm_states)(*zeros), **kwargs)


def train_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Mark padded steps as trained ones."""
    samples = SAMPLES(self, *args, **kwargs)
    return samples._replace(mask=torch.ones_like(samples.mask))


def restart_values(self: Any, obs: Any, lstm_states: Any, episode_starts: torch.Tensor) -> torch.Tensor:
    """Compute bootstrapped values from an empty memory."""
    return VALUES(self, obs, tuple(torch.zeros_like(part) for part in lstm_states), episode_starts)


def late_in_training(self: Any, obs: Any, actions: Any, lstm_states: Any, episode_starts: torch.Tensor) -> Any:
    """Apply each reset one step late in the update."""
    batch = lstm_states.pi[0].shape[1]
    late = episode_starts.reshape(batch, -1).roll(1, 1)
    late[:, 0] = episode_starts.reshape(batch, -1)[:, 0]
    return EVALUATE(self, obs, actions, lstm_states, late.flatten())


def detach_state(features: Any, lstm_states: Any, episode_starts: Any, lstm: Any) -> Any:
    """Cut the gradient between the steps of a sequence."""
    batch = lstm_states[0].shape[1]
    rows = []
    by_step = features.reshape(batch, -1, features.shape[-1]).unbind(1), episode_starts.reshape(batch, -1).unbind(1)
    for step, starts in zip(*by_step, strict=True):
        out, lstm_states = PROCESS(step, tuple(part.detach() for part in lstm_states), starts, lstm)
        rows.append(out)
    return torch.stack(rows, 1).flatten(0, 1), lstm_states


FAULTS: dict[str, tuple[type, str, Callable[..., Any], str]] = {
    "states stored as zeros": (RecurrentRolloutBuffer, "add", store_zeros, "states follow one another"),
    "padding that trains": (RecurrentRolloutBuffer, "_get_samples", train_padding, "padding"),
    "values of a restarted memory": (
        RecurrentActorCriticPolicy,
        "predict_values",
        restart_values,
        "bootstrapped values",
    ),
    "reset one step late": (
        RecurrentActorCriticPolicy,
        "evaluate_actions",
        late_in_training,
        "reset timing: sequence mode",
    ),
    "detached state": (RecurrentActorCriticPolicy, "_process_sequence", staticmethod(detach_state), "gradient horizon"),
}


@contextmanager
def seeded(name: str) -> Any:
    """Replace the method of a fault."""
    owner, method, replacement, _ = FAULTS[name]
    with patch.object(owner, method, replacement):
        yield


def main() -> int:
    """Seed each fault and print the failures. Return 1 if the expected one is not among them."""
    missed = 0
    for name, (*_, expected) in FAULTS.items():
        np.random.seed(0)  # noqa: NPY002  (the library draws from the global generator)
        with seeded(name):
            reports = check(0)
        failed = sorted({finding.name for report in reports for finding in report.failed})
        missed += expected not in failed
        print(f"{'found' if expected in failed else 'MISSED'}  {name}: {', '.join(failed)}", flush=True)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
