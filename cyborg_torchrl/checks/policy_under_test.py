"""The policy under test: its keys, and its two modes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CompositeDistribution, ProbabilisticTensorDictModule, TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, distributions
from torchrl.modules import set_recurrent_mode
from torchrl.modules.utils import get_primers_from_module

from cyborg_torchrl import keys

States = dict[Any, Tensor]
"""Memory states by their tensordict keys, [B, *shape] each."""


class Pass(NamedTuple):
    """Result of a run over steps [B, T]."""

    params: Tensor
    """All parameters of the action distribution, [B, T, P]."""
    dist: Any
    """The distribution over [B, T]; in step mode, a list with one for each step."""
    states: list[States]
    """States after each step, in step mode only."""


class PolicyUnderTest:
    """A copy of the policy with the keys that the checks need.

    Raises:
        ValueError: if the policy has no `get_dist`, or no recurrent state can be found.
    """

    def __init__(
        self, policy: TensorDictModuleBase, state_keys: Sequence[NestedKey] | None, is_init_key: NestedKey
    ) -> None:
        if not hasattr(policy, "get_dist"):
            raise ValueError(
                f"{type(policy).__name__} has no get_dist, so its log-probs cannot be recomputed: wrap it in "
                "tensordict.nn.ProbabilisticTensorDictSequential or torchrl.modules.ProbabilisticActor."
            )
        self.name = type(policy).__name__
        self.policy = copy.deepcopy(policy)
        self.is_init_key = unravel_key(is_init_key)
        self.state_keys = find_state_keys(policy) if state_keys is None else [unravel_key(key) for key in state_keys]
        if not self.state_keys:
            raise ValueError(
                f"no recurrent state was found in {self.name}: no entry of its out_keys is ('next', key) with key in "
                "its in_keys, and it has no primer. A policy without memory has nothing to check here; otherwise name "
                "its states with state_keys=[...]."
            )
        samplers = [m for m in policy.modules() if isinstance(m, ProbabilisticTensorDictModule)]
        sampler = samplers[-1] if samplers else None
        inputs = {unravel_key(key) for key in policy.in_keys}  # such as noise from outside
        self.param_keys = [] if sampler is None else [key for key in sampler.in_keys if unravel_key(key) not in inputs]
        self.action_key = unravel_key(sampler.out_keys[0]) if sampler is not None else keys.ACTION
        # Without return_log_prob there is no such key; the check of the rollout reports it.
        log_prob_key = sampler.log_prob_key if sampler is not None else None
        self.log_prob_key = unravel_key(log_prob_key) if log_prob_key else keys.ACTION_LOG_PROB
        not_inputs = {*self.state_keys, self.is_init_key}
        self.input_keys = [key for key in map(unravel_key, policy.in_keys) if key not in not_inputs]

    def states_of(self, tensordict: TensorDictBase) -> States:
        """Return the memory states in a tensordict."""
        return {key: tensordict.get(key) for key in self.state_keys}

    def run_sequence(self, steps: TensorDictBase) -> Pass:
        """Run sequence mode over steps [B, T] with inputs, flags and states."""
        work = steps.select(*self.input_keys, self.is_init_key, *self.state_keys)
        with set_recurrent_mode(True):
            dist = self._dist(work)
        return Pass(self._params(work, dist, steps.shape), dist, [])

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
            work.update(TensorDict(state, work.batch_size))
            with set_recurrent_mode(False):
                dist = self._dist(work)
            state = self._next_state(work)
            params.append(self._params(work, dist, work.shape))
            dists.append(dist)
            states.append(state)
        return Pass(torch.stack(params, 1), dists, states)

    def step_from(self, steps: TensorDictBase) -> tuple[Tensor, States]:
        """Run step mode for each of the steps [*B] separately, from its recorded state.

        Returns the log-probs of the recorded actions, [*B], and the states after the steps, [*B, *shape].
        """
        work = steps.select(*self.input_keys, self.is_init_key, *self.state_keys).reshape(-1)
        with set_recurrent_mode(False):
            dist = self._dist(work)
        log_prob = flat_log_prob(dist.log_prob(steps.get(self.action_key).flatten(0, steps.ndim - 1)), work.shape)
        states = {key: value.unflatten(0, steps.shape) for key, value in self._next_state(work).items()}
        return log_prob.unflatten(0, steps.shape), states

    def log_prob(self, run: Pass, steps: TensorDictBase) -> Tensor:
        """Return the log-probs of the recorded actions in sequence mode, [B, T]."""
        return flat_log_prob(run.dist.log_prob(steps.get(self.action_key)), steps.shape)

    def recorded_log_prob(self, steps: TensorDictBase) -> Tensor:
        """Return the recorded log-probs, [B, T]."""
        return flat_log_prob(steps.get(self.log_prob_key), steps.shape)

    def _dist(self, work: TensorDictBase) -> Any:
        dist = self.policy.get_dist(work)
        if isinstance(dist, CompositeDistribution):
            raise ValueError("composite action distributions cannot be checked yet: check a policy for one action.")
        return dist

    def _next_state(self, work: TensorDictBase) -> States:
        found = {key: work.get(unravel_key((keys.NEXT, key)), None) for key in self.state_keys}
        missing = [key for key, value in found.items() if value is None]
        if missing:
            raise KeyError(
                f"in step mode {self.name}.get_dist did not write ('next', key) for the states {missing}, so memory is "
                "lost after each step: write the next state under 'next', as torchrl.modules.GRUModule does."
            )
        return {key: value for key, value in found.items() if value is not None}

    def _params(self, work: TensorDictBase, dist: distributions.Distribution, shape: torch.Size) -> Tensor:
        found = [work.get(key, None) for key in self.param_keys]
        if not found or any(value is None for value in found):
            found = [getattr(dist, name) for name in dist.arg_constraints if name in vars(dist)]
        tensors = [value if value.is_floating_point() else value.float() for value in found]
        return torch.cat([value.reshape(*shape, -1) for value in tensors], -1)


def find_state_keys(policy: TensorDictModuleBase) -> list[NestedKey]:
    """Return the keys that the policy reads, and writes under "next", and the keys of its primers."""
    reads = [unravel_key(key) for key in policy.in_keys]
    writes = {unravel_key(key) for key in policy.out_keys}
    found = [key for key in reads if unravel_key((keys.NEXT, key)) in writes]
    primer = get_primers_from_module(policy, warn=False, strict=False)
    primers = [] if primer is None else getattr(primer, "transforms", [primer])
    for part in primers:
        found += [unravel_key(key) for key in part.primers.keys(include_nested=True, leaves_only=True)]
    return list(dict.fromkeys(found))


def flat_log_prob(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Return log-probs over the batch [*shape]; those of independent parts of an action are added."""
    return value.reshape(*shape, -1).sum(-1)


def _where(flags: Tensor, fresh: Tensor, carried: Tensor) -> Tensor:
    return torch.where(flags.view(-1, *(1,) * (carried.ndim - 1)), fresh.to(carried.dtype), carried)
