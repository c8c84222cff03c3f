"""The checker names every seeded fault correctly and reports nothing else, whatever the policy and the seed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from cyborg_torchrl.checks import Report, check_recurrent
from cyborg_torchrl.checks.tensordict_policy import find_state_keys

POLICIES = ("gru", "lru", "mamba", "mamba2", "mamba_gru", "pmm", "GRUModule", "LSTMModule")
NUM_ENVS, STEPS = 4, 20
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]
OPTIONS = {"steps": STEPS, "chunk_lengths": (1, 4, 10), "drift_updates": 1}
SINGLE, CHUNKS, FOLLOW = "same state: single steps", "same state: chunks of 10", "states follow one another"
RESET, HORIZON = "reset leak: sequence mode", "gradient horizon"


def zero_states(rollout: TensorDictBase, keys: list) -> TensorDictBase:
    for key in keys:
        rollout[key].zero_()
    return rollout


def swap_environments(rollout: TensorDictBase, keys: list) -> TensorDictBase:
    for key in keys:
        rollout[key] = rollout[key].roll(1, 0)
    return rollout


def shift_observations(rollout: TensorDictBase, keys: list) -> TensorDictBase:
    rollout["observation"] = rollout["observation"].roll(-1, 1)
    return rollout


def shuffle_steps(rollout: TensorDictBase, keys: list) -> TensorDictBase:
    return rollout[:, torch.randperm(rollout.shape[1])]


DATA_FAULTS = {
    "zeroed state": (zero_states, {SINGLE}, "all stored states are alike"),
    "swapped environments": (swap_environments, {SINGLE}, "states of another environment"),
    "off-by-one observations": (shift_observations, {SINGLE}, "off by one"),
    "shuffled steps": (shuffle_steps, {CHUNKS, FOLLOW}, "order of time was lost"),
}


def failed_names(report: Report) -> set[str]:
    return {finding.name for finding in report.failed}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", POLICIES)
def test_the_healthy_are_not_accused(name: str, seed: int, build_policy: Callable, primed_env: Callable) -> None:
    torch.manual_seed(seed)
    policy = build_policy(name)
    report = check_recurrent(policy, primed_env(policy, seed=seed), seed=seed, **OPTIONS)
    assert failed_names(report) == set()
    unseen = {f.name for f in report.findings if f.verdict == "not_applicable"}
    assert unseen == set(), "every check saw something"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_faults_of_the_data(fault: str, name: str, seed: int, build_policy: Callable, primed_env: Callable) -> None:
    torch.manual_seed(seed)
    policy = build_policy(name)
    with torch.no_grad():
        rollout = primed_env(policy, seed=seed).rollout(STEPS, policy, break_when_any_done=False)
    assert rollout.shape == (NUM_ENVS, STEPS)
    damage, expected, cause = DATA_FAULTS[fault]
    keys = find_state_keys(policy)
    report = check_recurrent(policy, rollout=damage(rollout, keys), seed=seed, **OPTIONS)
    assert expected <= failed_names(report)
    assert all(name.startswith(("same state", "states follow")) for name in failed_names(report)), (
        "the policy is innocent"
    )
    assert all(cause in f.explanation for f in report.failed if f.name.startswith("same state"))
    if fault == "shuffled steps":
        assert SINGLE not in failed_names(report), "each step by itself is right"


class IgnoresResets(TensorDictModuleBase):
    """The fault: a policy that does not look at `is_init`."""

    def __init__(self, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.policy = policy
        self.in_keys, self.out_keys = policy.in_keys, policy.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        flags = tensordict["is_init"]
        return self.policy(tensordict.set("is_init", torch.zeros_like(flags))).set("is_init", flags)

    def get_dist(self, tensordict: TensorDictBase) -> torch.distributions.Distribution:
        return self.policy.get_dist(tensordict.set("is_init", torch.zeros_like(tensordict["is_init"])))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_that_ignores_resets(name: str, seed: int, build_policy: Callable, primed_env: Callable) -> None:
    torch.manual_seed(seed)
    policy = IgnoresResets(build_policy(name))
    report = check_recurrent(policy, primed_env(policy, seed=seed), seed=seed, **OPTIONS)
    assert {RESET, "reset gradient leak: sequence mode", "step against sequence"} <= failed_names(report)
    assert not any(name.startswith(("environment", HORIZON, "states follow")) for name in failed_names(report))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_state_that_is_detached(name: str, seed: int, build_policy: Callable, primed_env: Callable) -> None:
    torch.manual_seed(seed)
    policy = build_policy(name, is_detached=True)
    report = check_recurrent(policy, primed_env(policy, seed=seed), seed=seed, **OPTIONS)
    assert failed_names(report) == {HORIZON}
    assert report[HORIZON].value in (0, 1)
    assert report.horizon is not None
    assert max(report.horizon.gradient[2:]) == 0
