"""Checks the values of a critic that has a separate memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.checks.findings import Finding, skip
from cyborg_torchrl.checks.recorder import Recorder
from cyborg_torchrl.cores import State
from cyborg_torchrl.modules import PPOAgent

Observation = dict[NestedKey, Tensor]


class Critic:
    """The separate critic of an agent as plain functions, whose outputs are values: see `MemoryPolicy`."""

    def __init__(self, agent: PPOAgent) -> None:
        agent = copy.deepcopy(agent)
        self.critic, self.backbone = agent.get_value_operator(), agent.memories[1][1]
        not_observed = {unravel_key(key) for key in (self.backbone.is_init_key, *self.backbone.state_keys.values())}
        self.observed_keys = [key for key in map(unravel_key, self.critic.in_keys) if key not in not_observed]

    def initial_state(self, batch: int) -> State:
        """Return the state at the start of an episode, {name: [batch, *shape]}."""
        initial = self.backbone.core.initial_state(batch)
        return {name: value.detach().clone() for name, value in initial.items()}

    def step(self, observation: Observation, state: State, is_first: Tensor) -> tuple[Tensor, State]:
        """Return values [B] and the next state."""
        work = self._run(observation, state, is_first)
        following = {name: work.get(unravel_key((keys.NEXT, key))) for name, key in self.backbone.state_keys.items()}
        return work.get(keys.VALUE).squeeze(-1), following

    def sequence(self, observations: Observation, state: State, is_first: Tensor) -> Tensor:
        """Return values [B, T]."""
        every = {name: value.unsqueeze(1).expand(*is_first.shape, *value.shape[1:]) for name, value in state.items()}
        with set_recurrent_mode(True):
            return self._run(observations, every, is_first).get(keys.VALUE).squeeze(-1)

    def value(self, outputs: Tensor) -> Tensor:
        """Return the outputs, which are values."""
        return outputs

    def parameters(self) -> Iterable[Tensor]:
        """Return the parameters of the critic."""
        return self.critic.parameters()

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation."""
        self.critic.train(mode)

    def _run(self, observation: Observation, state: State, is_first: Tensor) -> TensorDictBase:
        work = TensorDict({}, is_first.shape)
        for key, value in observation.items():
            work.set(key, value)
        for name, value in state.items():
            work.set(self.backbone.state_keys[name], value)
        return self.critic(work.set(self.backbone.is_init_key, is_first.unsqueeze(-1)))


def check_critic(agent: PPOAgent, rollout: TensorDictBase, **options: Any) -> list[Finding]:
    """Check the values of a rollout [N, T], and return findings whose names begin with "critic: ".

    Args:
        agent: an agent whose critic has a separate memory.
        rollout: steps with their memory states and values. Next values are checked if it holds them.
        **options: options of `Recorder.check`.
    """
    critic = Critic(agent)
    if rollout.get(keys.VALUE, None) is None:
        return [skip("critic", f"The rollout holds no values {keys.VALUE!r}.")]
    recorder = Recorder(critic)
    for step in rollout.unbind(1):
        observation = {key: step.get(key) for key in critic.observed_keys}
        state = {name: step.get(key) for name, key in critic.backbone.state_keys.items()}
        flags = step.get(critic.backbone.is_init_key)
        recorder.add(observation, flags, state=state, outputs=step.get(keys.VALUE).reshape(-1))
        following = step.get(keys.NEXT)
        if following.get(keys.VALUE, None) is not None:
            after = {key: following.get(key) for key in critic.observed_keys}
            recorder.bootstrap(after, following.get(keys.VALUE), ~following.get(keys.TERMINATED))
    found = recorder.check(**options).findings
    return [replace(finding, name=f"critic: {finding.name}") for finding in found]
