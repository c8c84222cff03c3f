# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (tensordict's and torchrl's annotations are narrower than what they take)
"""One step of policy and environment on tensors: what TensorDict modules and transforms compute, without them.

A policy becomes a list of calls, each reading entries of a flat dictionary and writing others; a native environment
and the transforms around it become one. Both compute with the same operations in the same order as their TensorDict
forms, so results are equal bit by bit, random numbers included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, distributions, nn
from torchrl.data import Composite
from torchrl.envs import EnvBase, InitTracker, RewardClipping, RewardSum, TensorDictPrimer, Transform, TransformedEnv

from cyborg_torchrl import keys
from cyborg_torchrl.cores import restart
from cyborg_torchrl.cores.linear import Linear, linear
from cyborg_torchrl.envs.memory_task import MemoryTask
from cyborg_torchrl.modules import Backbone, PPOAgent

Entries = dict[NestedKey, Tensor]
"""A tensordict, flat: (unravelled) keys to tensors."""
Call = Callable[[Entries], None]


class NotFusable(Exception):
    """Why something cannot be run on tensors alone."""


STACKED = 16
"""Steps that are kept apart before they are put side by side: few enough to be still in the cache by then."""


class Columns:
    """Entries of the steps of a rollout, put side by side as they come.

    Args:
        steps: T.
        tensors: where they go, [N, T, ...] each, by key, in memory time first; what is not there yet is allocated.
    """

    def __init__(self, steps: int, tensors: Entries | None = None) -> None:
        self.tensors: Entries = {} if tensors is None else tensors
        self._steps, self._begin = steps, 0
        self._before: dict[NestedKey, list[Tensor]] = {}
        self._after: dict[NestedKey, list[Tensor]] = {}

    def append(self, before: Iterable[tuple[NestedKey, Tensor]], after: Iterable[tuple[NestedKey, Tensor]]) -> None:
        """Takes the entries of one step: those before it, written by the policy or not, and those after it."""
        for rows, entries in ((self._before, before), (self._after, after)):
            for key, value in entries:
                if key in rows:
                    rows[key].append(value)
                else:
                    rows[key] = [value]
        count = len(self._before[keys.ACTION])
        if count == STACKED or self._begin + count == self._steps:
            for key, rows in self._before.items():
                self._put(key, rows)
            for key, rows in self._after.items():
                self._put((keys.NEXT, *key) if isinstance(key, tuple) else (keys.NEXT, key), rows)
            self._begin += count

    def _put(self, key: NestedKey, rows: list[Tensor]) -> None:
        first = rows[0]
        if key not in self.tensors:
            # in memory one step after the other, which is how they come
            self.tensors[key] = first.new_empty(self._steps, *first.shape).transpose(0, 1)
        torch.stack(rows, 0, out=self.tensors[key].transpose(0, 1)[self._begin : self._begin + len(rows)])
        rows.clear()


class FusedPolicy:
    """A policy as calls on entries; sampling, never the mode.

    Args:
        policy: a `PPOAgent`, or a sequence of TensorDictModules, our `Backbone` and TorchRL's sampler among them.

    Raises:
        NotFusable: if there is anything else in it.
    """

    def __init__(self, policy: nn.Module) -> None:
        self.written: tuple[NestedKey, ...] | None = None
        self._backbones: list[_BackboneStep] = []
        if isinstance(policy, PPOAgent):
            parts = (policy.encoder, policy.backbone, policy.fusion, policy.policy_head, policy.value_head)
            self.calls = [*map(self._call, parts), self._call(policy.sampler)]
            self.written = tuple(unravel_key(key) for key in policy.out_keys)
        else:
            self.calls = list(self._flat(policy))

    def begin(self, num_envs: int) -> None:
        """Called before a rollout: what depends on the parameters alone is computed once."""
        for step in self._backbones:
            step.begin(num_envs)

    def __call__(self, carried: Entries, *, may_begin: bool = True) -> Entries:
        """What the policy writes, for the entries before a step.

        Args:
            carried: the entries before the step.
            may_begin: an episode may begin at this step; without it `is_init` is not looked at.
        """
        entries = dict(carried)
        for step in self._backbones:
            step.may_begin = may_begin
        for call in self.calls:
            call(entries)
        if self.written is not None:
            return {key: entries[key] for key in self.written if key in entries}
        return {key: value for key, value in entries.items() if value is not carried.get(key)}

    def _flat(self, module: nn.Module) -> Iterable[Call]:
        if isinstance(module, (TensorDictSequential, ProbabilisticTensorDictSequential)):
            if getattr(module, "_select_before_return", False) or module.partial_tolerant:
                raise NotFusable("the policy selects among its keys")
            for part in module.module:
                yield from self._flat(part)
        else:
            yield self._call(module)

    def _call(self, module: nn.Module) -> Call:
        if isinstance(module, Backbone):
            self._backbones.append(_BackboneStep(module))
            return self._backbones[-1]
        if isinstance(module, ProbabilisticTensorDictModule):
            return _sampler(module)
        if type(module) is TensorDictModule and isinstance(module.module, nn.Module):
            return _module_call(module)
        raise NotFusable(f"the policy has a {type(module).__name__}")


class _BackboneStep:
    """One step of a core; restarts cost nothing where no episode begins."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.initial, self.may_begin = backbone, {}, True
        self.dtype = next((p.dtype for p in backbone.core.parameters()), torch.get_default_dtype())
        self.after = {name: unravel_key((keys.NEXT, key)) for name, key in backbone.state_keys.items()}

    def begin(self, num_envs: int) -> None:
        self.initial = self.backbone.core.initial_state(num_envs)

    def __call__(self, entries: Entries) -> None:
        backbone = self.backbone
        state = {name: entries[key].to(self.dtype) for name, key in backbone.state_keys.items()}
        if self.may_begin:
            state = restart(state, self.initial, entries[backbone.is_init_key].squeeze(-1))
        entries[backbone.out_key], state = backbone.core.step(entries[backbone.in_key], state)
        for name, key in self.after.items():
            entries[key] = state[name]


def _function(module: nn.Module) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """A linear layer without the module around it; its parameters are looked up at each call, as they are replaced."""
    if type(module) not in (nn.Linear, Linear) or module._forward_hooks or module._forward_pre_hooks:
        return module
    parameters = module._parameters
    return lambda x: linear(x, parameters["weight"], parameters["bias"])


def _module_call(module: TensorDictModule) -> Call:
    if module._kwargs or module.method_kwargs or module.method is not None or module._get_kwargs:
        raise NotFusable("the policy calls one of its networks in a way of its own")
    network = _function(module.module)
    reads, writes = [unravel_key(key) for key in module.in_keys], [unravel_key(key) for key in module.out_keys]

    def call(entries: Entries) -> None:
        result = network(*(entries[key] for key in reads))
        for key, value in zip(writes, (result,) if isinstance(result, Tensor) else result, strict=True):
            entries[key] = value

    return call


def _sampler(module: ProbabilisticTensorDictModule) -> Call:
    reads = [unravel_key(key) for key in module.in_keys]
    options = dict(module.distribution_kwargs or {})
    if module.num_samples is not None or getattr(module, "generator", None) is not None:
        raise NotFusable("the policy samples in a way of its own")
    action_key = unravel_key(module.dist_sample_keys[0])
    log_prob_key = unravel_key(module.log_prob_key) if module.return_log_prob else None
    if module.distribution_class is distributions.Categorical and reads == ["logits"] and not options:

        def call(entries: Entries) -> None:
            logits = entries["logits"]
            logits = logits - _logsumexp(logits)
            # torch.multinomial without its checks: the same random numbers, and the same draws
            probs = torch.softmax(logits, -1)
            action = (probs / torch.empty_like(probs).exponential_(1)).argmax(-1)
            entries[action_key] = action
            if log_prob_key is not None:
                entries[log_prob_key] = logits.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    else:
        if not all(isinstance(key, str) for key in reads) or len(module.dist_sample_keys) != 1:
            raise NotFusable(f"the policy draws from a {module.distribution_class.__name__}")

        def call(entries: Entries) -> None:
            dist = module.distribution_class(**{key: entries[key] for key in reads}, **options)
            action = dist.rsample() if dist.has_rsample else dist.sample()
            entries[action_key] = action
            if log_prob_key is not None:
                entries[log_prob_key] = dist.log_prob(action)

    return call


def _logsumexp(logits: Tensor) -> Tensor:
    """As `torch.logsumexp` over the last dimension, in half the time: for rows with a finite greatest entry."""
    greatest = logits.amax(-1, keepdim=True)
    return (logits - greatest).exp_().sum(-1, keepdim=True).log_().add_(greatest)


class FusedEnv:
    """A native environment and its transforms as one step on entries.

    Args:
        env: a `MemoryTask` behind any of TorchRL's InitTracker, RewardSum, RewardClipping and TensorDictPrimer.

    Raises:
        NotFusable: if it is anything else.
    """

    def __init__(self, env: EnvBase) -> None:
        transforms, task = _unwrapped(env)
        if not isinstance(task, MemoryTask):
            raise NotFusable(f"{type(task).__name__} is not one of the native environments")
        self.task = task
        self.never = torch.zeros(task.num_envs, 1, dtype=torch.bool, device=task.device)
        self.defaults: Entries = {}
        """What entries are where an episode begins: sums of rewards, memory states."""
        self.has_is_init = False
        self._then: list[Callable[[Entries, Entries], None]] = []
        for transform in transforms:
            if type(transform) is InitTracker:
                self.has_is_init = True
            elif type(transform) is RewardSum and list(transform.in_keys) == [keys.REWARD]:
                self._then.append(self._sum(unravel_key(transform.out_keys[0])))
            elif type(transform) is RewardClipping:
                self._then.append(_clip(transform))
            elif type(transform) is TensorDictPrimer and not transform.random:
                self.defaults |= _defaults(transform, task)
            else:
                raise NotFusable(f"the environment has a {type(transform).__name__}")

    def step(self, carried: Entries, written: Entries) -> tuple[Entries, Entries, Tensor | None]:
        """Takes a step.

        Args:
            carried: the entries before it.
            written: what the policy made of them.

        Returns:
            The entries after the step (under "next" in a tensordict), those that the next step begins with, and where
            episodes begin there, [N, 1]; None: nowhere.
        """
        observation, success, reward, terminated = self.task.advance(written[keys.ACTION])
        after: Entries = {
            keys.OBSERVATION: observation,
            keys.SUCCESS: success,
            keys.REWARD: reward,
            keys.DONE: terminated,
            keys.TERMINATED: terminated,
            keys.TRUNCATED: self.never,
        }
        if self.has_is_init:
            after[keys.IS_INIT] = self.never
        for then in self._then:
            then(after, carried)
        for key in self.defaults:
            if key not in after:
                after[key] = written.get((keys.NEXT, *_parts(key)), carried[key])
        begins = dict(after)
        del begins[keys.REWARD]
        if not bool(terminated.any()):
            return after, begins, None
        begins[keys.OBSERVATION], begins[keys.SUCCESS] = self.task.restart(terminated.squeeze(-1))
        begins[keys.DONE] = begins[keys.TERMINATED] = self.never
        if self.has_is_init:
            begins[keys.IS_INIT] = terminated
        for key, default in self.defaults.items():
            is_over = terminated.view(-1, *(1,) * (default.ndim - 1))
            begins[key] = torch.where(is_over, default, after[key])
        return after, begins, terminated

    def _sum(self, key: NestedKey) -> Callable[[Entries, Entries], None]:
        self.defaults[key] = torch.zeros(self.never.shape, device=self.never.device)

        def then(after: Entries, carried: Entries) -> None:
            after[key] = carried[key] + after[keys.REWARD]

        return then


def _clip(transform: RewardClipping) -> Callable[[Entries, Entries], None]:
    low, high = transform.clamp_min, transform.clamp_max

    def then(after: Entries, _: Entries) -> None:
        after[keys.REWARD] = after[keys.REWARD].clamp(low, high)

    return then


def _parts(key: NestedKey) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)


def _unwrapped(env: EnvBase) -> tuple[list[Transform], EnvBase]:
    """The transforms around an environment, the innermost first, and what they are around."""
    transforms: list[Transform] = []
    while isinstance(env, TransformedEnv):
        transform = env.transform
        parts = list(getattr(transform, "transforms", [transform])) if transform is not None else []
        transforms = [*parts, *transforms]
        env = env.base_env
    return transforms, env


def _defaults(primer: TensorDictPrimer, task: MemoryTask) -> Entries:
    values, primers = primer.default_value, cast("Composite", primer.primers)
    found: Entries = {}
    for key, spec in primers.items(True, True):
        key = unravel_key(key)
        value = values.get(key, None) if isinstance(values, Mapping) else values
        if not isinstance(value, (int, float)) or spec.shape[:1] != (task.num_envs,):
            raise NotFusable("the environment's primer has values of its own")
        found[key] = torch.full(spec.shape, value, dtype=spec.dtype, device=task.device)
    return found
