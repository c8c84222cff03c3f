"""The policy under test: its steps, its sequences, and the scores in which a recorded rollout is compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

States = dict[Any, Tensor]
"""Memory states by their tensordict keys, [B, *shape] each."""


class Pass(NamedTuple):
    """Result of a run over steps [B, T]."""

    params: Tensor
    """All parameters of the action distribution, [B, T, P]."""
    dist: Any
    """The distribution over [B, T], or the library's own outputs; in step mode, a list with one for each step."""
    states: list[States]
    """States after each step, in step mode only."""


class Acted(NamedTuple):
    """Result of one step of a batch [B]."""

    params: Tensor
    """All parameters of the action distribution, [B, P]."""
    dist: Any
    states: States


class PolicyUnderTest(ABC):
    """A recurrent policy of any library, seen through tensordicts of steps.

    Steps [B, T] hold the inputs, the flags of first steps and the memory states under the keys below.
    """

    name: str
    input_keys: list[NestedKey]
    state_keys: list[NestedKey]
    is_init_key: NestedKey
    has_gradient = True
    """False if the policy cannot compute gradients, as one in numpy."""
    has_reduced_precision = False
    """True if a part of the policy computes in less than float32."""
    recorded_keys: tuple[NestedKey, ...] = ()
    """Further entries that a rollout may hold, such as the action."""

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """Return the trained tensors, which the checks change in place and restore."""

    @abstractmethod
    def act(self, work: TensorDictBase) -> Acted:
        """Run one step of a batch [B] in step mode, with the states in `work`."""

    @abstractmethod
    def value(self, work: TensorDictBase) -> Tensor | None:
        """Return the value estimates of a batch [B] in step mode; None if the policy has none."""

    @abstractmethod
    def run_sequence(self, steps: TensorDictBase) -> Pass:
        """Run sequence mode over steps [B, T] with inputs, flags and states."""

    @abstractmethod
    def score(self, params: Tensor, dist: Any, steps: TensorDictBase) -> Tensor:
        """Return the numbers [*B, K] that a recorded rollout holds as well: log-probs, or scaled outputs."""

    @abstractmethod
    def recorded_score(self, steps: TensorDictBase) -> Tensor:
        """Return the recorded numbers, [*B, K]."""

    @abstractmethod
    def log_prob(self, run: Pass, steps: TensorDictBase) -> Tensor | None:
        """Return the log-probs of the recorded actions in sequence mode, [B, T]; None if there are no actions."""

    @contextmanager
    @abstractmethod
    def evaluating(self) -> Generator[None, None, None]:
        """Switch the policy to evaluation and back."""

    @contextmanager
    @abstractmethod
    def in_float64(self) -> Generator[PolicyUnderTest, None, None]:
        """Provide the same policy with parameters in float64."""

    def states_of(self, tensordict: TensorDictBase) -> States:
        """Return the memory states in a tensordict."""
        return {key: tensordict.get(key) for key in self.state_keys}

    def run_steps(self, steps: TensorDictBase, *, is_primed: bool = True) -> Pass:
        """Run step mode over steps [B, T], and carry the state from step to step as a collector does.

        The first state is that of the first step. Where an episode begins, the policy gets the state in `steps`, as an
        environment's primer would write it. Without a primer (`is_primed=False`) it gets the last episode's state.
        """
        inputs = steps.select(*self.input_keys, self.is_init_key)
        handed = self.states_of(steps)
        state = {key: value[:, 0] for key, value in handed.items()}
        params, dists, states = [], [], []
        for t in range(steps.shape[1]):
            work = inputs[:, t].copy()
            flags = work.get(self.is_init_key).reshape(-1)
            if t and is_primed:
                state = {key: _where(flags, handed[key][:, t], value) for key, value in state.items()}
            acted = self.act(work.update(TensorDict(state, work.batch_size)))
            state = acted.states
            params.append(acted.params)
            dists.append(acted.dist)
            states.append(state)
        return Pass(torch.stack(params, 1), dists, states)

    def step_from(self, steps: TensorDictBase) -> tuple[Tensor, States]:
        """Run step mode for each of the steps [*B] separately, from its recorded state.

        Returns the scores, [*B, K], and the states after the steps, [*B, *shape].
        """
        wanted = [*self.input_keys, self.is_init_key, *self.state_keys, *self.recorded_keys]
        work = steps.select(*wanted, strict=False).reshape(-1)
        acted = self.act(work.select(*self.input_keys, self.is_init_key, *self.state_keys))
        score = self.score(acted.params, acted.dist, work)
        states = {key: value.unflatten(0, steps.shape) for key, value in acted.states.items()}
        return score.unflatten(0, steps.shape), states

    @contextmanager
    def changing_parameters(self) -> Generator[list[Tensor], None, None]:
        """Provide the parameters to be changed in place; afterwards they have their old values and gradients again."""
        parameters = self.parameters()
        before = [(parameter.detach().clone(), parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            yield parameters
        finally:
            with torch.no_grad():
                for parameter, (value, gradient) in zip(parameters, before, strict=True):
                    parameter.copy_(value)
                    parameter.grad = gradient


def with_state(steps: TensorDictBase, states: Mapping[Any, Tensor]) -> TensorDictBase:
    """Return a copy of steps [B, T] that starts from other states [B, *shape]."""
    steps = steps.clone()
    for key, value in states.items():
        stored = steps.get(key)
        steps.set(key, torch.cat([value.detach().unsqueeze(1).to(stored.dtype), stored[:, 1:]], 1))
    return steps


def _where(flags: Tensor, fresh: Tensor, carried: Tensor) -> Tensor:
    return torch.where(flags.view(-1, *(1,) * (carried.ndim - 1)), fresh.to(carried.dtype), carried)
