"""A TorchRL policy under test: its keys, and its two modes."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import CompositeDistribution, ProbabilisticTensorDictModule, TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, distributions
from torchrl.modules import set_recurrent_mode
from torchrl.modules.utils import get_primers_from_module

from cyborg_torchrl import keys
from cyborg_torchrl.checks.policy_under_test import Acted, Pass, PolicyUnderTest, States
from cyborg_torchrl.modules.encoders import Autocast


class TensorDictPolicy(PolicyUnderTest):
    """A copy of a TorchRL policy with the keys that the checks need.

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
        self.has_reduced_precision = any(isinstance(module, Autocast) for module in policy.modules())
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
        self.recorded_keys = (self.action_key, self.log_prob_key)
        not_inputs = {*self.state_keys, self.is_init_key}
        self.input_keys = [key for key in map(unravel_key, policy.in_keys) if key not in not_inputs]

    def parameters(self) -> list[Tensor]:
        """Return the parameters that require gradients."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def act(self, work: TensorDictBase) -> Acted:
        """Run one step of a batch [B] in step mode."""
        with set_recurrent_mode(False):
            dist = self._dist(work)
        return Acted(self._params(work, dist, work.shape), dist, self._next_state(work))

    def value(self, work: TensorDictBase) -> Tensor | None:
        """Return the entry "state_value" of the policy's output, [B]; None if there is none."""
        with set_recurrent_mode(False), torch.random.fork_rng():
            value = self.policy(work.copy()).get(keys.VALUE, None)
        return None if value is None else value.reshape(work.shape)

    def run_sequence(self, steps: TensorDictBase) -> Pass:
        """Run sequence mode over steps [B, T] with inputs, flags and states."""
        work = steps.select(*self.input_keys, self.is_init_key, *self.state_keys)
        with set_recurrent_mode(True):
            dist = self._dist(work)
        return Pass(self._params(work, dist, steps.shape), dist, [])

    def score(self, params: Tensor, dist: Any, steps: TensorDictBase) -> Tensor:
        """Return the log-probs of the recorded actions, [*B, 1]."""
        return _flat(dist.log_prob(steps.get(self.action_key)), steps.shape).unsqueeze(-1)

    def recorded_score(self, steps: TensorDictBase) -> Tensor:
        """Return the recorded log-probs, [*B, 1]."""
        return _flat(steps.get(self.log_prob_key), steps.shape).unsqueeze(-1)

    def log_prob(self, run: Pass, steps: TensorDictBase) -> Tensor:
        """Return the log-probs of the recorded actions in sequence mode, [B, T]."""
        return self.score(run.params, run.dist, steps).squeeze(-1)

    @contextmanager
    def evaluating(self) -> Generator[None, None, None]:
        """Switch to `eval()`, then give each module its own mode again."""
        modes = [(module, module.training) for module in self.policy.modules()]
        self.policy.eval()
        try:
            yield
        finally:
            for module, is_training in modes:
                module.training = is_training

    @contextmanager
    def in_float64(self) -> Generator[PolicyUnderTest, None, None]:
        """Provide a copy in float64."""
        other = copy.copy(self)
        other.policy = copy.deepcopy(self.policy).double()
        yield other

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


def _flat(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Return log-probs over the batch [*shape]; those of independent parts of an action are added."""
    return value.reshape(*shape, -1).sum(-1)
