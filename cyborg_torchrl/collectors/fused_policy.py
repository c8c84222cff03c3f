"""One step of a policy on tensors, without its TensorDict modules.

A policy becomes a list of calls. Each reads entries of a flat dictionary and writes others, with the same operations in
the same order as its TensorDict form. Results are equal bit by bit, random numbers included. A compiled step is the
exception: it rounds differently, by some units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, distributions, nn
from torch.nn import functional as F
from torchrl.envs import EnvBase
from torchrl.modules import SafeProbabilisticModule, SafeProbabilisticTensorDictSequential, SafeSequential

from cyborg_torchrl.collectors.backbone_step import BackboneStep
from cyborg_torchrl.collectors.compiled_step import Networks, compile_step
from cyborg_torchrl.collectors.flat_dict import Call, FlatDict, NotFusable, flat
from cyborg_torchrl.modules import Backbone, PPOAgent
from cyborg_torchrl.modules.encoders import ObservationEncoder
from cyborg_torchrl.modules.nan_check import check_finite

SEQUENTIAL = (
    TensorDictSequential,
    ProbabilisticTensorDictSequential,
    SafeSequential,
    SafeProbabilisticTensorDictSequential,
)
"""Sequences that only call their parts."""
PLAIN = (TensorDictModule, ObservationEncoder)
"""Modules that only call their network."""


class FusedPolicy:
    """A policy as calls on entries.

    Args:
        policy: a `PPOAgent`, or a sequence of TensorDictModules, our `Backbone` and TorchRL's sampler among them.
        compiled_step: compute the networks of a `PPOAgent` by one C++ call, where there is one (`compile_step`).
        is_greedy: take the likeliest action instead of a sample.

    Raises:
        NotFusable: if there is anything else in it.
    """

    def __init__(self, policy: nn.Module, *, compiled_step: bool = True, is_greedy: bool = False) -> None:
        self.is_greedy = is_greedy
        self.in_keys: list[NestedKey] = [unravel_key(key) for key in getattr(policy, "in_keys", ())]
        self.written: tuple[NestedKey, ...] | None = None
        self._log_probs: list[NestedKey] = []
        self._backbones: list[BackboneStep] = []
        self._networks: Networks | None = None
        if isinstance(policy, PPOAgent):
            _check_plain(policy, PPOAgent)
            self.calls = [self._call(part) for part in (*policy.networks, policy.sampler)]
            self.written = tuple(unravel_key(key) for key in policy.out_keys)
            if compiled_step and not policy.critic:
                self._networks = Networks(*policy.networks)
        else:
            self.calls = list(self._flat(policy))
        self._rollout_calls = self.calls

    def begin(self, num_envs: int) -> None:
        """Prepare a rollout, in which no parameter may change.

        Args:
            num_envs: rows of each step.
        """
        for step in self._backbones:
            step.begin(num_envs)
        # Parameters may have changed since the last rollout, so the compiled step is built anew.
        compiled = None if self._networks is None else compile_step(self._networks, self._backbones[0], num_envs)
        self._rollout_calls = self.calls if compiled is None else [compiled, self.calls[-1]]

    def check(self, steps: FlatDict) -> None:
        """Check a rollout for invalid probabilities, which torch's sampler would check at every step.

        Raises:
            RuntimeError: if a log-probability is NaN.
        """
        for key in self._log_probs:
            log_prob = steps.get(key)
            if log_prob is not None and bool(log_prob.isnan().any()):
                env, step = log_prob.isnan().nonzero()[0, :2].tolist()
                raise RuntimeError(
                    f"probability tensor contains either `inf` or `nan`: '{key}' is NaN in environment {env} at step "
                    f"{step} of the rollout, and maybe elsewhere. Has training diverged?"
                )

    def __call__(self, carried: FlatDict, *, may_begin: bool = True) -> FlatDict:
        """Return the entries that the policy writes.

        Args:
            carried: the entries before the step.
            may_begin: True if an episode may begin at this step. If not, `is_init` is not read.
        """
        # A shallow copy: calls add and replace entries, and never write into the tensors of the step before.
        entries = dict(carried)
        for step in self._backbones:
            step.may_begin = may_begin
        for call in self._rollout_calls:
            call(entries)
        if self.written is not None:
            return {key: entries[key] for key in self.written if key in entries}
        return {key: value for key, value in entries.items() if value is not carried.get(key)}

    def _flat(self, module: nn.Module) -> Iterable[Call]:
        if isinstance(module, (TensorDictSequential, ProbabilisticTensorDictSequential)):
            _check_plain(module, *SEQUENTIAL)
            if getattr(module, "_select_before_return", False) or module.partial_tolerant:
                raise NotFusable("the policy selects among its keys")
            for part in module.module:
                yield from self._flat(part)
        else:
            yield self._call(module)

    def _call(self, module: nn.Module) -> Call:
        if type(module) is Backbone:  # a subclass may change any part of the step
            _check_plain(module, Backbone)
            self._backbones.append(BackboneStep(module))
            return self._backbones[-1]
        if isinstance(module, ProbabilisticTensorDictModule):
            _check_plain(module, ProbabilisticTensorDictModule, SafeProbabilisticModule)
            if module.return_log_prob:
                self._log_probs.append(unravel_key(module.log_prob_key))
            return _sampler(module, is_greedy=self.is_greedy)
        if type(module) not in PLAIN:
            raise NotFusable(f"the policy has a {type(module).__name__}")
        _check_plain(module, *PLAIN)
        if not isinstance(module.module, nn.Module):
            raise NotFusable("the policy has a TensorDictModule of a function that is no nn.Module")
        return _module_call(module)


def _check_plain(module: nn.Module, *kinds: type[nn.Module]) -> None:
    """Check that a module only calls its parts: no overridden methods, no hooks."""
    kind = type(module)
    for name in ("forward", "get_dist", "get_dist_params"):
        own = getattr(kind, name, None)
        if own is not None and not any(own is getattr(known, name, None) for known in kinds):
            raise NotFusable(f"the policy has a {kind.__name__} with a {name} of its own")
    if module._forward_hooks or module._forward_pre_hooks:
        raise NotFusable(f"the policy has a {kind.__name__} with hooks")


def _function(module: nn.Module) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """Return a linear layer without its module; parameters are looked up at each call, since they may be replaced."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return module
    parameters = module._parameters
    return lambda x: F.linear(x, parameters["weight"], parameters["bias"])


def _module_call(module: TensorDictModule) -> Call:
    if module._kwargs or module.method_kwargs or module.method is not None or module._get_kwargs:
        raise NotFusable("the policy calls one of its networks in a way of its own")
    network = _function(module.module)
    reads, writes = [unravel_key(key) for key in module.in_keys], [unravel_key(key) for key in module.out_keys]

    def call(entries: FlatDict) -> None:
        result = network(*(entries[key] for key in reads))
        if isinstance(result, Mapping):
            result = tuple(result[key] for key in module.out_keys)
        for key, value in zip(writes, (result,) if isinstance(result, Tensor) else result, strict=True):
            entries[key] = value

    return call


def _sampler(module: ProbabilisticTensorDictModule, *, is_greedy: bool) -> Call:
    reads = [unravel_key(key) for key in module.in_keys]
    names = [key[-1] if isinstance(key, tuple) else key for key in module.dist_keys]
    options = dict(module.distribution_kwargs or {})
    if module.num_samples is not None or getattr(module, "generator", None) is not None:
        raise NotFusable("the policy samples in a way of its own")
    action_key = unravel_key(module.dist_sample_keys[0])
    log_prob_key = unravel_key(module.log_prob_key) if module.return_log_prob else None
    if module.distribution_class is distributions.Categorical and names == ["logits"] and not options:

        def call(entries: FlatDict) -> None:
            logits = entries[reads[0]]
            logits = logits - _logsumexp(logits)
            probs = torch.softmax(logits, -1)
            if not is_greedy:  # torch.multinomial without its checks: the same random numbers, and the same draws
                probs = probs / torch.empty_like(probs).exponential_(1)
            action = probs.argmax(-1)
            entries[action_key] = action
            if log_prob_key is not None:
                entries[log_prob_key] = logits.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    else:
        is_drawn_at_once = isinstance(module, SafeProbabilisticModule)  # it draws action and log-prob together
        if is_drawn_at_once or len(module.dist_sample_keys) != 1:
            raise NotFusable(f"the policy draws from a {module.distribution_class.__name__}")
        if is_greedy and not hasattr(module.distribution_class, "deterministic_sample"):
            raise NotFusable(f"a {module.distribution_class.__name__} has no deterministic sample")

        def draw(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
            dist = module.distribution_class(**parameters, **options)
            action = _action(dist, is_greedy=is_greedy)
            return action, None if log_prob_key is None else dist.log_prob(action)

        def call(entries: FlatDict) -> None:
            known = ((name, entries.get(key)) for name, key in zip(names, reads, strict=True))
            parameters = {name: value for name, value in known if value is not None}
            try:
                action, log_prob = draw(parameters)
            except (ValueError, RuntimeError):  # torch refuses NaN, and its message names no environment
                action, log_prob = _drawn_without_nan(draw, parameters)
            entries[action_key] = action
            if log_prob_key is not None and log_prob is not None:
                entries[log_prob_key] = log_prob

    return call


def _drawn_without_nan(
    draw: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor | None]], parameters: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Draw with ones instead of parameters that are not finite. Log-probs are NaN there, for the rollout's check."""
    is_finite = torch.cat(list(parameters.values()), -1).isfinite().all(-1)
    cleaned = {name: value.nan_to_num(1.0, 1.0, 1.0) for name, value in parameters.items()}
    action, log_prob = draw(cleaned)
    return action, None if log_prob is None else log_prob.masked_fill(~is_finite, torch.nan)


def _action(dist: distributions.Distribution, *, is_greedy: bool) -> Tensor:
    if is_greedy:
        return dist.deterministic_sample
    return dist.rsample() if dist.has_rsample else dist.sample()


def _logsumexp(logits: Tensor) -> Tensor:
    """Return `torch.logsumexp` over the last dimension in half the time, for rows with a finite maximum."""
    greatest = logits.amax(-1, keepdim=True)
    return (logits - greatest).exp_().sum(-1, keepdim=True).log_().add_(greatest)


class OpaquePolicy:
    """Any other policy, called between flat dictionaries.

    Args:
        policy: a TensorDictModule.
        env: the environment in which it acts.
    """

    def __init__(self, policy: TensorDictModuleBase, env: EnvBase) -> None:
        self.policy, self.batch_size, self.device = policy, env.batch_size, env.device
        self.in_keys: list[NestedKey] = [unravel_key(key) for key in policy.in_keys]

    def begin(self, num_envs: int) -> None:
        """Prepare nothing."""

    def check(self, steps: FlatDict) -> None:
        """Check nothing, since the policy has its checks."""

    def __call__(self, carried: FlatDict, *, may_begin: bool = True) -> FlatDict:
        """Return the entries that the policy writes.

        Raises:
            NonFiniteError: if the policy refuses its inputs, and one of them is not finite.
        """
        del may_begin
        read = TensorDict(dict(carried), self.batch_size, device=self.device)
        try:
            entries = flat(self.policy(read.copy()))
        except (ValueError, RuntimeError):  # torch's message about NaN names neither entry nor environment
            check_finite(read.reshape(-1).unsqueeze(1), self.in_keys, is_rollout=False)
            raise
        return {key: value for key, value in entries.items() if value is not carried.get(key)}


PolicyStep = FusedPolicy | OpaquePolicy
"""Both have the same interface."""


def policy_step(
    policy: TensorDictModuleBase, env: EnvBase, *, compiled_step: bool = True, is_greedy: bool = False
) -> PolicyStep:
    """Return the step of a policy on entries. A policy that cannot be taken apart is called as a whole.

    Args:
        policy: acts in the environment.
        env: gives batch size and device.
        compiled_step: see `FusedPolicy`.
        is_greedy: see `FusedPolicy`. A policy that is called as a whole follows TorchRL's exploration type instead.
    """
    try:
        return FusedPolicy(policy, compiled_step=compiled_step, is_greedy=is_greedy)
    except NotFusable:
        return OpaquePolicy(policy, env)
