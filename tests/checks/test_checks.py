"""What the checker sees, what it refuses, and what it leaves alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, Unbounded
from torchrl.envs import InitTracker, PendulumEnv, TensorDictPrimer, TransformedEnv
from torchrl.modules import GRUModule, TanhNormal, recurrent_mode, set_recurrent_mode
from torchrl.modules.utils import get_primers_from_module

from cyborg_torchrl.checks import Finding, Report, check_recurrent
from cyborg_torchrl.config import load_config
from cyborg_torchrl.training.builders import build_agent, build_env

OPTIONS = {"steps": 16, "chunk_lengths": (1, 8), "drift_updates": 1}


def failed_names(report: Report) -> set[str]:
    return {finding.name for finding in report.failed}


@pytest.fixture
def policy(build_policy: Callable) -> TensorDictModuleBase:
    return build_policy("gru")


@pytest.fixture
def env(policy: TensorDictModuleBase, primed_env: Callable) -> TransformedEnv:
    return primed_env(policy)


class Wrapped(TensorDictModuleBase):
    """A policy around another, to be damaged."""

    def __init__(self, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.policy = policy
        self.in_keys, self.out_keys = policy.in_keys, policy.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self.policy(tensordict)

    def get_dist(self, tensordict: TensorDictBase) -> torch.distributions.Distribution:
        return self.policy.get_dist(tensordict)


def test_nothing_is_changed(policy: TensorDictModuleBase, env: TransformedEnv) -> None:
    before = copy.deepcopy(policy.state_dict())
    random = torch.get_rng_state()
    rollout = env.rollout(16, policy, break_when_any_done=False).detach()
    kept = rollout.clone()
    torch.set_rng_state(random)
    check_recurrent(policy, env, **OPTIONS)
    check_recurrent(policy, rollout=rollout, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert set(rollout.keys(True, True)) == set(kept.keys(True, True))
    assert (rollout == kept).all()
    assert env.rollout(5, policy, break_when_any_done=False).shape == (4, 5), "the environment can still be used"


class Damaged(nn.Module):
    """A core with a fault in its sequences."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def __getattr__(self, name: str) -> object:
        return super().__getattr__(name) if name == "core" else getattr(self.core, name)


class IgnoresResets(Damaged):
    def forward_with_terms(self, x: torch.Tensor, state: dict, is_init: torch.Tensor) -> tuple:
        return self.core.forward_with_terms(x, state, torch.zeros_like(is_init))


class CutsGradients(Damaged):
    def forward_with_terms(self, x: torch.Tensor, state: dict, is_init: torch.Tensor) -> tuple:
        outputs = []
        for t in range(x.shape[1]):
            state = {name: value.detach() for name, value in state.items()}
            output, state, terms = self.core.forward_with_terms(x[:, t : t + 1], state, is_init[:, t : t + 1])
            outputs.append(output)
        return torch.cat(outputs, 1), state, terms


@pytest.mark.parametrize(
    ("where", "fault", "expected"),
    [
        (None, None, set()),
        ("critic", IgnoresResets, {"critic: reset leak: sequence mode"}),
        ("actor", IgnoresResets, {"reset leak: sequence mode"}),
        ("critic", CutsGradients, {"critic: gradient horizon"}),
        ("actor", CutsGradients, {"gradient horizon"}),
    ],
)
def test_both_memories_of_an_agent_with_a_separate_critic_are_checked(
    where: str | None, fault: type | None, expected: set[str]
) -> None:
    overrides = ["backbone=gru", "backbone.hidden_size=8", "env.horizon=5", "env.num_envs=4"]
    cfg = load_config(overrides=[*overrides, "agent.separate_critic=true"])
    env = build_env(cfg)
    agent = build_agent(cfg, env)
    env.append_transform(get_primers_from_module(agent))
    if fault is not None:
        backbone = agent.critic[1] if where == "critic" else agent.backbone
        backbone.core = fault(backbone.core)
    report = check_recurrent(agent, env, **OPTIONS)
    assert expected <= failed_names(report)
    assert all(name.startswith("critic: ") == (where == "critic") for name in failed_names(report))
    assert report["critic: same state: whole rows"].verdict != "not_applicable"


def test_the_same_seed_gives_the_same_report(policy: TensorDictModuleBase, env: TransformedEnv) -> None:
    reports = [check_recurrent(policy, env, seed=seed, **OPTIONS).to_json() for seed in (0, 0, 1)]
    assert reports[0] == reports[1] != reports[2]


@pytest.mark.parametrize("name", ["gru", "LSTMModule"])
def test_environments_that_never_end_an_episode(name: str, build_policy: Callable, primed_env: Callable) -> None:
    policy = build_policy(name)
    env = primed_env(policy, p_terminated=0.0, p_truncated=0.0)
    report = check_recurrent(policy, env, **OPTIONS)
    assert report.has_passed
    assert report["reset leak: sequence mode"].verdict == "passed", "with resets of the checker's own"


def test_one_environment_alone(policy: TensorDictModuleBase, primed_env: Callable) -> None:
    report = check_recurrent(policy, primed_env(policy, num_envs=1), **OPTIONS)
    assert report.has_passed
    assert report.num_envs == 1
    assert report["environment leak: step mode"].verdict == "passed"
    rollout = primed_env(policy, num_envs=1).rollout(16, policy, break_when_any_done=False)
    assert check_recurrent(policy, rollout=rollout[0], **OPTIONS).has_passed


def test_continuous_actions(build_small_core: Callable, make_agent: Callable, make_env: Callable) -> None:
    agent = make_agent(build_small_core("lru"), Bounded(-2.0, 2.0, (2,)))
    rows = []
    rollout = make_env(4).rollout(16, break_when_any_done=False)
    state = agent.backbone.core.initial_state(4)
    for t in range(16):
        td = rollout[:, t].select("observation", "is_init")
        start = {n: torch.where(td["is_init"].view(4, 1, 1), torch.zeros(()), s) for n, s in state.items()}
        with torch.no_grad():
            td = agent(td.set("memory_state", TensorDict(start, [4])))
        state = dict(td["next", "memory_state"].items())
        rows.append(td)
    report = check_recurrent(agent, rollout=torch.stack(rows, 1), **OPTIONS)
    assert report.has_passed
    assert report["same state: chunks of 8"].verdict == "passed"
    assert report["drift: KL(fresh || stored)"].value > 0


def test_a_collectors_rollout(policy: TensorDictModuleBase, make_env: Callable) -> None:
    collector = Collector(
        make_env(4), policy, frames_per_batch=64, total_frames=128, auto_register_policy_transforms=True
    )
    rollouts = [rollout.clone() for rollout in collector]
    collector.shutdown()
    assert check_recurrent(policy, rollout=rollouts[1], **OPTIONS).has_passed


def test_stale_parameters_are_accused(policy: TensorDictModuleBase, env: TransformedEnv) -> None:
    rollout = env.rollout(16, policy, break_when_any_done=False).detach()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    report = check_recurrent(policy, rollout=rollout, **OPTIONS)
    assert {"same state: single steps", "states follow one another"} <= failed_names(report)
    assert "other parameters" in report["same state: single steps"].explanation


def test_dropout_is_named(build_policy: Callable, primed_env: Callable) -> None:
    policy = build_policy("GRUModule")
    policy.module[0].module = nn.Sequential(policy.module[0].module, nn.Dropout(0.5))
    report = check_recurrent(policy, primed_env(policy), **OPTIONS)
    assert "repeatable" in failed_names(report)
    policy.eval()
    assert check_recurrent(policy, primed_env(policy), **OPTIONS).has_passed


class BatchCentred(nn.Module):
    """The fault: features are normalised over the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0, keepdim=True)


def test_a_leak_between_environments(build_policy: Callable, primed_env: Callable) -> None:
    policy = build_policy("GRUModule")
    policy.module[0].module = nn.Sequential(policy.module[0].module, BatchCentred())
    names = failed_names(check_recurrent(policy, primed_env(policy), **OPTIONS))
    modes = ("step mode", "sequence mode")
    assert {f"environment leak: {mode}" for mode in modes} <= names
    assert {f"environment gradient leak: {mode}" for mode in modes} <= names
    assert "environments alone and together" in names
    assert not any(name.startswith("reset") for name in names)


class StepsOnly(Wrapped):
    """The original fault: sequences are trained as single steps, each from its own stored state."""

    def get_dist(self, tensordict: TensorDictBase) -> torch.distributions.Distribution:
        with set_recurrent_mode(False):
            return self.policy.get_dist(tensordict)


def test_single_steps_have_no_gradient_through_time(policy: TensorDictModuleBase, env: TransformedEnv) -> None:
    report = check_recurrent(StepsOnly(policy), env, **OPTIONS)
    assert report["same state: chunks of 8"].verdict == "passed", "each step is right by itself"
    assert report["gradient horizon"].value == 0
    assert "gradient horizon" in failed_names(report)
    assert "step against sequence" in failed_names(report)


def test_observations_without_gradient(build_policy: Callable, primed_env: Callable) -> None:
    """Behind a frozen encoder the horizon is that of the memory state."""
    intact, broken = build_policy("GRUModule"), build_policy("GRUModule", is_detached=True)
    for policy in (intact, broken):
        policy.module[0].module = nn.Sequential(policy.module[0].module, Detach())
    report = check_recurrent(intact, primed_env(intact), **OPTIONS)
    assert report.has_passed
    assert report.horizon.leaf == "memory state"
    assert failed_names(check_recurrent(broken, primed_env(broken), **OPTIONS)) == {"gradient horizon"}


class Detach(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()


def test_a_policy_that_does_not_use_its_memory(build_policy: Callable, primed_env: Callable) -> None:
    policy = build_policy("GRUModule")
    with torch.no_grad():
        policy.module[1].gru.weight_hh_l0.zero_()
        policy.module[1].gru.weight_hh_l1.zero_()
        for bias in (policy.module[1].gru.bias_ih_l0, policy.module[1].gru.bias_ih_l1):
            bias[8:16] = -60.0  # the update gate is shut: nothing of the state is kept
    report = check_recurrent(policy, primed_env(policy), **OPTIONS)
    assert report.has_passed
    assert report["gradient horizon"].verdict == "not_applicable"
    assert report["same state: chunks of 8"].verdict == "not_applicable"


def test_figures_that_are_not_judged(policy: TensorDictModuleBase, env: TransformedEnv) -> None:
    still = check_recurrent(policy, env, **{**OPTIONS, "drift_updates": 0})
    moved = check_recurrent(policy, env, **{**OPTIONS, "drift_updates": 5, "drift_learning_rate": 1e-2})
    for name in ("drift: KL(fresh || stored)", "drift: |dparams| / max |params|", "drift: |dh| / |h|"):
        assert still[name].value == pytest.approx(0.0, abs=1e-6)
        assert moved[name].value > 1e-4
        assert moved[name].verdict == "info"
    size = 16 * 4  # 16 numbers of 4 bytes
    assert still["states, MB per 100,000 steps: each step stored"].value == pytest.approx(size * 1e5 / 1e6)
    assert still["states, MB per 100,000 steps: one a chunk of 8"].value == pytest.approx(size * 1e5 / 8 / 1e6)


def test_the_report(policy: TensorDictModuleBase, env: TransformedEnv) -> None:
    seen = []
    report = check_recurrent(policy, env, on_progress=lambda name, share: seen.append((name, share)), **OPTIONS)
    assert [share for _, share in seen] == sorted(share for _, share in seen)
    assert seen[-1] == ("done", 1.0)
    content = json.loads(report.to_json())
    assert content["has_passed"] is True
    assert content["state_keys"] == ["memory_state/hidden"]
    assert {finding["name"] for finding in content["findings"]} == {finding.name for finding in report.findings}
    assert len(content["horizon"]["gradient"]) == 8
    console = Console(width=200, record=True, quiet=True)
    console.print(report.table())
    with pytest.raises(KeyError, match="gradient horizon"):
        report["no such finding"]


def test_the_table_and_json_of_the_accused() -> None:
    finding = Finding("ratio", float("nan"), 1e-4, "failed", "They differ.", "Mend it.")
    size = Finding("size", 1075.2, None, "info", "Megabytes.")
    report = Report("Policy", ("h",), 4, 16, 0, (finding, size))
    assert not report.has_passed
    assert json.loads(report.to_json())["findings"][0]["value"] == "nan"
    console = Console(width=200, record=True)
    console.print(report.table())
    text = console.export_text()
    assert "1 failed" in text
    assert "1,075" in text
    assert "They differ. Mend it." in text


def test_refusals(policy: TensorDictModuleBase, env: TransformedEnv, make_env: Callable) -> None:
    rollout = env.rollout(16, policy, break_when_any_done=False).detach()
    with pytest.raises(ValueError, match="an environment to collect from"):
        check_recurrent(policy)
    with pytest.raises(ValueError, match="not both"):
        check_recurrent(policy, env, rollout=rollout)
    with pytest.raises(ValueError, match="chunk_lengths"):
        check_recurrent(policy, env, chunk_lengths=(0,))
    with pytest.raises(ValueError, match="steps must be >= 4; got 3"):
        check_recurrent(policy, env, steps=3)
    with pytest.raises(ValueError, match="consecutive steps"):
        check_recurrent(policy, rollout=rollout[:, :3])
    with pytest.raises(KeyError, match="get_primers_from_module"):
        check_recurrent(policy, make_env(4))
    with pytest.raises(KeyError, match="InitTracker"):
        check_recurrent(policy, make_env(4).base_env)
    with pytest.raises(KeyError, match="return_log_prob=True"):
        check_recurrent(policy, rollout=rollout.exclude("action_log_prob"))
    with pytest.raises(KeyError, match="observation"):
        check_recurrent(policy, rollout=rollout.exclude("observation"))
    with pytest.raises(KeyError, match="'action'"):
        check_recurrent(policy, rollout=rollout.exclude("action"))


def test_policies_that_cannot_be_checked(env: TransformedEnv, build_policy: Callable) -> None:
    plain = TensorDictSequential(TensorDictModule(nn.Linear(3, 3), in_keys=["observation"], out_keys=["logits"]))
    with pytest.raises(ValueError, match="ProbabilisticActor"):
        check_recurrent(plain, env)
    theirs = build_policy("GRUModule")
    with pytest.raises(ValueError, match="no recurrent state"):
        check_recurrent(type(theirs)(theirs.module[0], theirs.module[2], theirs.module[4]), env)


def test_a_state_outside_of_the_tensordict(build_policy: Callable, primed_env: Callable) -> None:
    policy = build_policy("GRUModule")
    policy.module[0].module = nn.Sequential(policy.module[0].module, Remembers())
    report = check_recurrent(policy, primed_env(policy), **OPTIONS)
    assert "repeatable" in failed_names(report)
    assert "state outside the tensordict" in report["repeatable"].explanation


class Remembers(nn.Module):
    """The fault: memory that is kept in the module."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + 0.01 * self.calls


class FirstStateOnly(Wrapped):
    """The fault: in sequence mode memory starts from zero, whatever was stored."""

    def get_dist(self, tensordict: TensorDictBase) -> torch.distributions.Distribution:
        if recurrent_mode():
            tensordict.set("recurrent_state", torch.zeros_like(tensordict["recurrent_state"]))
        return self.policy.get_dist(tensordict)


def test_sequences_that_forget_their_stored_state(build_policy: Callable, primed_env: Callable) -> None:
    policy = FirstStateOnly(build_policy("GRUModule"))
    report = check_recurrent(policy, primed_env(policy), **OPTIONS)
    assert {"same state: chunks of 1", "same state: chunks of 8", "step against sequence"} <= failed_names(report)
    assert report["same state: single steps"].verdict == "passed"
    assert report["same state: whole rows"].verdict == "passed", "these begin with an episode"
    assert "sequence mode is not its step mode" in report["same state: chunks of 8"].explanation


def test_a_primer_that_is_not_zero_is_accused_where_it_is_not_read_alike(
    build_policy: Callable, make_env: Callable
) -> None:
    """TorchRL's module starts from zero when it acts, and from the stored state in sequences."""
    policy = build_policy("GRUModule")
    env = make_env(4)
    env.append_transform(TensorDictPrimer({"recurrent_state": Unbounded((2, 8))}, default_value=0.7, expand_specs=True))
    report = check_recurrent(policy, env, **OPTIONS)
    assert "same state: whole rows" in failed_names(report)
    assert report["same state: single steps"].verdict == "passed"


def test_states_that_come_back_in_half_precision(policy: TensorDictModuleBase, env: TransformedEnv) -> None:
    rollout = env.rollout(16, policy, break_when_any_done=False).detach()
    rollout["memory_state", "hidden"] = rollout["memory_state", "hidden"].half().float()
    assert "same state: single steps" in failed_names(check_recurrent(policy, rollout=rollout, **OPTIONS))
    assert check_recurrent(policy, rollout=rollout, tolerance=0.02, **OPTIONS).has_passed


def test_an_environment_without_batch_and_several_scalar_observations() -> None:
    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(_side_by_side, in_keys=["th", "thdot"], out_keys=["embedding"]),
        GRUModule(2, 8, in_keys=["embedding", "h"], out_keys=["memory", ("next", "h")]),
        TensorDictModule(nn.Sequential(nn.Linear(8, 2), NormalParamExtractor()), ["memory"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=TanhNormal,
            return_log_prob=True,
            log_prob_key="action_log_prob",
        ),
    )
    env = TransformedEnv(PendulumEnv(), InitTracker())
    env.append_transform(get_primers_from_module(policy))
    report = check_recurrent(policy, env, **OPTIONS)
    assert report.has_passed
    assert (report.num_envs, report.steps) == (1, 16)
    assert report["drift: KL(fresh || stored)"].value > 0, "estimated: torch has no formula for it"


def _side_by_side(*values: torch.Tensor) -> torch.Tensor:
    return torch.stack(values, -1)


class LeavesResetsToThePrimer(Wrapped):
    """Healthy: in step mode it takes the state that it is handed, in sequence mode the stored one at each reset."""

    def get_dist(self, tensordict: TensorDictBase) -> torch.distributions.Distribution:
        if not recurrent_mode():
            tensordict = tensordict.set("is_init", torch.zeros_like(tensordict["is_init"]))
        return self.policy.get_dist(tensordict)


def test_resets_may_be_left_to_the_primer(build_policy: Callable, primed_env: Callable) -> None:
    policy = LeavesResetsToThePrimer(build_policy("GRUModule"))
    env = primed_env(policy)
    assert check_recurrent(policy, env, **OPTIONS).has_passed
    rollout = env.rollout(16, policy, break_when_any_done=False).detach()
    rollout["recurrent_state"] = torch.rand_like(rollout["recurrent_state"])  # no primer at work
    assert "reset leak: step mode" in failed_names(check_recurrent(policy, rollout=rollout, **OPTIONS))


def test_very_short_rollouts(policy: TensorDictModuleBase, env: TransformedEnv) -> None:
    assert check_recurrent(policy, env, steps=4).has_passed
