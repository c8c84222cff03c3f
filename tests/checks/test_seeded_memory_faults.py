"""Faults of resets, gradients, caches, evaluations, values and padding: each is named by one check alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.modules import recurrent_mode, set_recurrent_mode

from cyborg_torchrl.checks import Report, check_padding, check_recurrent
from cyborg_torchrl.checks.tensordict_policy import find_state_keys

POLICIES = ("gru", "lru", "mamba", "mamba2", "mamba_gru", "pmm", "GRUModule", "LSTMModule")
QUICK = ("lru", "LSTMModule")
NUM_ENVS, STEPS = 4, 20
OPTIONS = {"steps": STEPS, "chunk_lengths": (1, 10), "drift_updates": 1}
CASES = [
    pytest.param(name, seed, marks=() if name in QUICK and seed == 0 else pytest.mark.slow)
    for name in POLICIES
    for seed in range(5)
]


class Damaged(TensorDictModuleBase):
    """A policy around another, whose inputs `damage` changes."""

    def __init__(self, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.policy = policy
        self.in_keys, self.out_keys = list(policy.in_keys), list(policy.out_keys)
        self.memory_keys = find_state_keys(policy)

    def damage(self, tensordict: TensorDictBase) -> TensorDictBase:
        raise NotImplementedError

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        changed = self.policy(self.damage(tensordict.copy()))
        return tensordict.update(changed.exclude(*self.in_keys))

    def get_dist(self, tensordict: TensorDictBase) -> torch.distributions.Distribution:
        changed = self.damage(tensordict.copy())
        dist = self.policy.get_dist(changed)
        tensordict.update(changed.exclude(*self.in_keys))
        return dist


class LateInTraining(Damaged):
    def damage(self, tensordict: TensorDictBase) -> TensorDictBase:
        if recurrent_mode():
            flags = tensordict["is_init"].roll(1, 1)
            flags[:, 0] = False
            tensordict["is_init"] = flags
        return tensordict


class EarlyInTraining(Damaged):
    def damage(self, tensordict: TensorDictBase) -> TensorDictBase:
        if recurrent_mode():
            flags = tensordict["is_init"].roll(-1, 1)
            flags[:, -1] = False
            tensordict["is_init"] = flags
        return tensordict


class LateInActing(Damaged):
    """In step mode the flag of the last step is applied, which is kept in the state."""

    def __init__(self, policy: TensorDictModuleBase) -> None:
        super().__init__(policy)
        self.in_keys.append("was_first")
        self.out_keys.append(("next", "was_first"))

    def damage(self, tensordict: TensorDictBase) -> TensorDictBase:
        if not recurrent_mode():
            flags = tensordict["is_init"]
            tensordict["is_init"] = tensordict["was_first"] > 0.5
            tensordict["next", "was_first"] = flags.float()
        return tensordict


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        weight = torch.ones(grad.shape[:2], device=grad.device)
        weight[:, 1::2] = 1.1
        return grad * weight.unsqueeze(-1)


class WrongBackward(Damaged):
    def damage(self, tensordict: TensorDictBase) -> TensorDictBase:
        if recurrent_mode():
            tensordict["observation"] = BadBackward.apply(tensordict["observation"])
        return tensordict


class LosesStateOnChange(Damaged):
    """The state is dropped at the first step after a change of parameters, as a cache would be."""

    version: int | None = None

    def damage(self, tensordict: TensorDictBase) -> TensorDictBase:
        if not recurrent_mode():
            version = sum(parameter._version for parameter in self.policy.parameters())
            if self.version not in (None, version):
                for key in self.memory_keys:
                    tensordict[key] = torch.zeros_like(tensordict[key])
            self.version = version
        return tensordict


class LearnsInEvaluation(Damaged):
    """Running statistics of observations are updated in evaluation."""

    mean = 0.0

    def damage(self, tensordict: TensorDictBase) -> TensorDictBase:
        if not self.training:
            self.mean = 0.9 * self.mean + 0.1 * float(tensordict["observation"].mean())
        tensordict["observation"] = tensordict["observation"] - self.mean
        return tensordict


class MixesUpAtPartialResets(Damaged):
    """In step mode environments that restart are moved behind the others."""

    def damage(self, tensordict: TensorDictBase) -> TensorDictBase:
        flags = tensordict["is_init"].squeeze(-1)
        if not recurrent_mode() and flags.any() and not flags.all():
            order = torch.cat([(~flags).nonzero(), flags.nonzero()]).squeeze(-1)
            for key in self.memory_keys:
                tensordict[key] = tensordict[key][order]
        return tensordict


POLICY_FAULTS = {
    "reset late in training": (LateInTraining, "reset timing: sequence mode"),
    "reset early in training": (EarlyInTraining, "reset timing: sequence mode"),
    "reset late in acting": (LateInActing, "reset timing: step mode"),
    "wrong backward pass": (WrongBackward, "gradient: sequence against steps"),
    "state lost when parameters change": (LosesStateOnChange, "state after a parameter change"),
    "evaluation disturbs training": (LearnsInEvaluation, "evaluation in between"),
    "partial resets mix up environments": (MixesUpAtPartialResets, "partial reset: step mode"),
}


def failed_names(report: Report) -> set[str]:
    return {finding.name for finding in report.failed}


@pytest.mark.parametrize(("name", "seed"), CASES)
@pytest.mark.parametrize("fault", POLICY_FAULTS)
def test_faults_of_the_policy(fault: str, name: str, seed: int, build_policy: Callable, primed_env: Callable) -> None:
    torch.manual_seed(seed)
    damaged, expected = POLICY_FAULTS[fault]
    policy = damaged(build_policy(name))
    env = primed_env(policy.policy, seed=seed)
    if fault == "reset late in acting":
        env.append_transform(TensorDictPrimer({"was_first": Unbounded((1,))}, expand_specs=True))
    report = check_recurrent(policy, env, seed=seed, **OPTIONS)
    assert failed_names(report) == {expected}
    offsets = {"reset early in training": -1, "reset late in training": 1, "reset late in acting": 1}
    if fault in offsets:
        assert report[expected].value == offsets[fault]


def rollout_with_values(policy: TensorDictModuleBase, env: object, *, is_restarted: bool) -> TensorDictBase:
    """A rollout with the values of the next observations, from the memory of the episode or from a new one."""
    with torch.no_grad():
        rollout = env.rollout(STEPS, policy, break_when_any_done=False)
        following = rollout["next"].select("observation", *find_state_keys(policy)).reshape(-1)
        if is_restarted:
            for key in find_state_keys(policy):
                following[key] = torch.zeros_like(following[key])
        following["is_init"] = torch.full((*following.shape, 1), is_restarted)
        with set_recurrent_mode(False):
            policy(following)
    rollout["next", "state_value"] = following["state_value"].reshape(*rollout.shape, 1)
    return rollout


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_bootstrapped_values(name: str, seed: int, build_policy: Callable, primed_env: Callable) -> None:
    torch.manual_seed(seed)
    policy = build_policy(name)
    for is_restarted in (False, True):
        rollout = rollout_with_values(policy, primed_env(policy, seed=seed), is_restarted=is_restarted)
        report = check_recurrent(policy, rollout=rollout, seed=seed, **OPTIONS)
        assert failed_names(report) == ({"bootstrapped values"} if is_restarted else set())
        assert report["bootstrapped values"].verdict == ("failed" if is_restarted else "passed")
        assert not is_restarted or "restarted memory" in report["bootstrapped values"].explanation


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_padding_that_trains(name: str, seed: int, build_policy: Callable, primed_env: Callable) -> None:
    torch.manual_seed(seed)
    policy = build_policy(name)
    rollout = primed_env(policy, seed=seed).rollout(STEPS, policy, break_when_any_done=False).detach()
    is_padding = torch.arange(STEPS) >= torch.tensor([STEPS, 12, 9, 15]).unsqueeze(1)
    batch = {"observation": rollout["observation"], "action": rollout["action"]}

    def update(batch: dict[str, Tensor], *, is_masked: bool) -> list[Tensor]:
        steps = rollout.clone().update(batch)
        with set_recurrent_mode(True):
            log_prob = policy.get_dist(steps).log_prob(steps["action"])
        loss = log_prob[~is_padding].mean() if is_masked else log_prob.mean()
        wanted = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        return [loss, *(g for g in torch.autograd.grad(loss, wanted, allow_unused=True) if g is not None)]

    good = check_padding(lambda batch: update(batch, is_masked=True), batch, is_padding, seed=seed)
    bad = check_padding(lambda batch: update(batch, is_masked=False), batch, is_padding, seed=seed)
    assert (good.verdict, bad.verdict) == ("passed", "failed"), (good, bad)
