"""tianshou: its recurrent actor and critic, trained on the stacked observations of its buffer.

Its documentation trains recurrent networks on `stack_num` observations that the buffer stacks, from an empty state. In
acting the collector hands the state from step to step, with one observation at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from tianshou.data import Batch, VectorReplayBuffer
from tianshou.utils.net.continuous import RecurrentActorProb
from torch import Tensor

from benchmarks.honesty.common import ACTIONS, FEATURES, WIDTH, draw
from cyborg_torchrl.checks import Report, check_memory

PACKAGE = "tianshou"
STACK = 4
"""The number of stacked observations in tianshou's own recurrent examples."""


class Functions:
    """The functions of the actor: see `MemoryPolicy`."""

    def __init__(self) -> None:
        sizes = {"state_shape": (FEATURES,), "action_shape": (ACTIONS,), "hidden_layer_size": WIDTH}
        self.actor = RecurrentActorProb(layer_num=1, **sizes, unbounded=True, conditioned_sigma=True)

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """Return zeros, batch first."""
        return {name: torch.zeros(batch, 1, WIDTH) for name in ("hidden", "cell")}

    def step(self, observation: Tensor, state: dict[str, Tensor], is_first: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """Act on one observation, with the state zeroed where episodes begin, as the collector does."""
        keep = (~is_first).view(-1, 1, 1)
        # The actor reads its input with torch.as_tensor in float32.
        return self.actor(observation, {name: part * keep for name, part in state.items()})

    def sequence(self, observations: Tensor, state: dict[str, Tensor], is_first: Tensor) -> Any:
        """Run the stacked observations that the library's buffer returns for each step."""
        batch, length = is_first.shape
        buffer = VectorReplayBuffer(batch * length, batch, stack_num=STACK, ignore_obs_next=True)
        numbers = np.arange(batch * length).reshape(batch, length)
        for t in range(length):
            ends = is_first[:, t + 1].numpy() if t + 1 < length else np.zeros(batch, dtype=bool)
            step = {"obs": numbers[:, t], "act": np.zeros(batch), "rew": np.zeros(batch)}
            buffer.add(Batch(**step, terminated=ends, truncated=np.zeros(batch, dtype=bool)))
        stacked = buffer.get(np.arange(batch * length), "obs").astype(int)
        (mean, sigma), _ = self.actor(observations.flatten(0, 1)[torch.as_tensor(stacked)])
        return mean.view(batch, length, -1), sigma.view(batch, length, -1)

    def parameters(self) -> Iterable[Tensor]:
        """Return the actor's parameters."""
        return self.actor.parameters()


def check(seed: int) -> tuple[Report, Report | None]:
    """Check the actor; its on-policy rollouts store no states that could be replayed."""
    torch.manual_seed(seed)
    return check_memory(Functions(), draw(seed), seed=seed), None
