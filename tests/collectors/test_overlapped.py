"""Groups that step while the policy acts for others: what they yield, and what becomes of errors."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from tensordict import TensorDictBase

from cyborg_torchrl.collectors import OverlappedCollector, RolloutCollector
from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.data import Rollout
from cyborg_torchrl.training.builders import build_agent, build_env, build_trainer

STEPS = 23
CASES = {
    "native": ["env=delayed_cue", "env.horizon=4", "backbone=lstm"],
    "gymnasium": ["env=gymnasium", "env.id=CartPole-v1", "backbone=gru"],
    "truncated": ["env=gymnasium", "env.id=CartPole-v1", "env.max_episode_steps=5", "backbone=lru"],
    "transformed": ["env=delayed_cue", "env.horizon=4", "transforms.previous_action=true", "backbone=mamba_gru"],
    "processes": ["env=gymnasium", "env.id=CartPole-v1", "env.workers=1", "backbone=lru"],
}
SMALL = ["backbone.hidden_size=16", f"train.n_steps={STEPS}", "train.recurrent_mode=burn_in", "train.seq_len=8"]


def groups_of(options: list[str], groups: int, num_envs: int):
    cfg = load_config("public_benchmark", [*SMALL, *options])
    envs = [build_env(cfg, num_envs=num_envs, seed=i) for i in range(groups)]
    torch.manual_seed(0)
    agent = build_agent(cfg, envs[0])
    options = {
        "frames_per_batch": STEPS * num_envs * groups,
        "total_frames": 2 * STEPS * num_envs * groups,
        "value_operator": agent.get_value_operator(),
        "keyframe_steps": lambda steps: range(0, steps, 8),
        "exclude_keys": [("next", "truncated")],
    }
    return envs, agent, options


def rollouts_of(collector) -> list[Rollout]:
    collector.set_seed(4)
    torch.manual_seed(7)
    try:
        return list(collector)
    finally:
        collector.shutdown()


def assert_equal(ours: TensorDictBase, theirs: TensorDictBase) -> None:
    assert {str(key) for key in ours.keys(True, True)} == {str(key) for key in theirs.keys(True, True)}
    for key in theirs.keys(True, True):
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("case", CASES)
def test_one_group_yields_what_it_yields_alone(case: str) -> None:
    found = []
    for kind in ("overlapped", "by TorchRL"):
        (env,), agent, options = groups_of(CASES[case], 1, 4)
        if kind == "overlapped":
            made = OverlappedCollector([env], agent, **options)
        else:
            made = RolloutCollector(env, agent, is_fused=False, **options)
        found.append(rollouts_of(made))
    for ours, theirs in zip(*found, strict=True):
        assert_equal(ours.steps, theirs.steps)
        assert_equal(ours.keyframes, theirs.keyframes)
        assert ours.at == theirs.at == (0, 8, 16)


@pytest.mark.parametrize("case", ["native", "truncated", "processes"])
def test_what_is_yielded_does_not_depend_on_timing(case: str) -> None:
    found = []
    for is_overlapped in (True, False):
        envs, agent, options = groups_of(CASES[case], 3, 2)
        found.append(rollouts_of(OverlappedCollector(envs, agent, is_overlapped=is_overlapped, **options)))
    for ours, theirs in zip(*found, strict=True):
        assert ours.steps.shape == (6, STEPS)
        assert_equal(ours.steps, theirs.steps)
        assert_equal(ours.keyframes, theirs.keyframes)


def test_states_stay_with_their_environments() -> None:
    """Stored states are those that the network reaches again from the rollout's first, whatever group steps when."""
    envs, agent, options = groups_of(CASES["native"], 2, 2)
    collector = OverlappedCollector(envs, agent, **options)
    next(iter(collector))
    rollout = collector.rollout()
    core, key = agent.backbone.core, agent.backbone.state_keys
    first = {name: rollout.keyframes[:, 0].get(k) for name, k in key.items()}
    with torch.no_grad():
        features = agent.encoder(rollout.steps[:, :8].clone()).get(agent.backbone.in_key)
        _, last = core(features, first, rollout.steps["is_init"][:, :8].squeeze(-1))
    for name, k in key.items():
        restarted = rollout.steps["is_init"][:, 8].squeeze(-1)
        stored = rollout.keyframes[:, 1].get(k)
        torch.testing.assert_close(stored[~restarted], last[name][~restarted])
        assert not stored[restarted].any()
    collector.shutdown()


def test_a_group_steps_while_the_policy_acts_for_another() -> None:
    envs, agent, options = groups_of(CASES["native"], 2, 2)
    collector = OverlappedCollector(envs, agent, **options)
    acts, steps, changed = [], [], threading.Condition()

    def count(_) -> None:
        with changed:
            acts.append(None)
            changed.notify_all()

    def wait(before):
        with changed:  # by now it has acted for the first group once more than for the second, or is about to
            steps.append(changed.wait_for(lambda: len(acts) >= 2 * (len(steps) + 1), timeout=20))
        return step(before)

    step, collector._tracks[0].step = collector._tracks[0].step, wait
    collector._acts.calls.insert(0, count)
    collector.rollout()
    assert steps == [True] * STEPS
    collector.shutdown()


def test_an_error_in_a_step_comes_out_and_nothing_steps_on() -> None:
    envs, agent, options = groups_of(CASES["native"], 2, 2)
    collector = OverlappedCollector(envs, agent, **options)

    def fail(before):
        time.sleep(0.05)
        raise RuntimeError("the simulator died")

    collector._tracks[1].step = fail
    with pytest.raises(RuntimeError, match="the simulator died"):
        collector.rollout()
    collector.shutdown()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("environments")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames_per_batch": 7}, "frames_per_batch must be a multiple of the 4 environments; got 7"),
        ({"total_frames": 13}, "total_frames must be a multiple of frames_per_batch"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    envs, agent, options = groups_of(CASES["native"], 2, 2)
    with pytest.raises(ValueError, match=message):
        OverlappedCollector(envs, agent, **{**options, **change})


def test_groups_of_different_sizes_and_policies_without_values_are_refused() -> None:
    envs, agent, options = groups_of(CASES["native"], 1, 2)
    other, _, _ = groups_of(CASES["native"], 1, 3)
    with pytest.raises(ValueError, match=r"batches of one size \[n\]; got \[\[2\], \[3\]\]"):
        OverlappedCollector([*envs, *other], agent, **options)
    with pytest.raises(ValueError, match="has to write 'state_value'"):
        OverlappedCollector(envs, agent.get_policy_operator(), **options)


def test_it_trains_by_config_and_the_update_sees_what_acted() -> None:
    options = [*SMALL, *CASES["truncated"], "env.num_envs=4", "collector=overlapped", "env.workers=2"]
    training = build_trainer(load_config("public_benchmark", options))
    metrics = [training.trainer.update(rollout) for rollout, _ in zip(training.trainer.collector, range(2))]  # noqa: B905
    training.trainer.close()
    assert max(each["ratio_error"] for each in metrics) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["env.num_envs=5"], "collector.groups = 2 does not divide env.num_envs = 5"),
        (["env.workers=1"], "collector.groups = 2 does not divide env.workers = 1"),
        (["transforms.normalize_reward=true"], "transforms.normalize_reward keeps one statistic"),
        (["collector.groups=0"], "collector.groups"),
    ],
    ids=str,
)
def test_what_cannot_be_split_is_refused(change: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_trainer(
            load_config(
                "public_benchmark", [*SMALL, *CASES["gymnasium"], "env.num_envs=4", "collector=overlapped", *change]
            )
        )
