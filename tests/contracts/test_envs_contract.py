"""Every registered environment keeps the contract of `check_environment`, and what training needs beyond it.

An environment that is registered needs a line in CASES.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import Compose, EnvBase, InitTracker, RewardSum, TransformedEnv

import cyborg_torchrl.config  # noqa: F401  (registers what is shipped)
from cyborg_torchrl.checks import check_environment
from cyborg_torchrl.collectors import RolloutCollector
from cyborg_torchrl.cores import build_gru
from cyborg_torchrl.envs import MemoryTask, oracle_policy
from cyborg_torchrl.envs.popgym.build import native_ids
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.registry import environments


class Case(NamedTuple):
    """A small variant of a registered environment."""

    name: str
    options: dict[str, Any]
    time_limit: str | None = "terminated"
    """How an episode of full length ends; None: it may be either."""
    package: str | None = None
    """What must be installed for it."""
    num_steps: int | None = None
    """None: two episodes."""
    growth: int = 1
    """Steps that one more step of the horizon adds to the longest episode."""

    def __str__(self) -> str:
        return "-".join(map(str, (self.name, *self.options.values())))


# A first action often ends MineSweeperEasy.
NATIVE_IDS = [name for name in native_ids() if ("Medium" if "MineSweeper" in name else "Easy") in name]
LENGTHS = dict.fromkeys(("popgym-LabyrinthEscapeEasy-v0", "popgym-LabyrinthExploreEasy-v0"), 1100)
CASES = [
    Case("assoc_recall", {"horizon": 3, "pairs": 2}),
    Case("associative_recall", {"horizon": 3, "pairs": 2}),
    Case("color_cubes", {"horizon": 1, "cubes": 3, "phases": 2, "grid": 3}, growth=2),
    Case("color_cubes", {"level": "extreme"}, growth=3),
    Case("copy_memory", {"horizon": 3, "sequence": 2}),
    Case("delayed_cue", {"horizon": 0}),
    Case("delayed_cue", {"horizon": 4}),
    Case("distractor_nav", {"horizon": 3, "distractors": 2}),
    Case("endless_tmaze", {"horizon": 3, "corridors": 2}, growth=12),
    Case("endless_tmaze", {"horizon": 3, "corridors": 2, "random_lengths": True}, growth=12),
    Case("multi_cue_delay", {"horizon": 3, "cues": 2}),
    Case("n_back", {"horizon": 4, "n": 2}),
    Case("pattern_binding", {"horizon": 3, "patterns": 2}),
    Case("permuted_copy", {"horizon": 3, "sequence": 3}),
    Case("tmaze", {"horizon": 4}),
    # no pole falls within 7 steps
    Case("gymnasium", {"id": "CartPole-v1", "max_episode_steps": 7}, "truncated", "gymnasium"),
    *(Case("popgym", {"id": name}, None, num_steps=LENGTHS.get(name)) for name in NATIVE_IDS),
    Case("popgym", {"id": "popgym-RepeatFirstEasy-v0", "native": False}, None, "popgym"),
    Case("popgym", {"id": "popgym-AutoencodeEasy-v0", "native": False}, None, "popgym"),
    Case("bsuite", {"id": "memory_len/2"}, None, "bsuite"),
    Case("minigrid", {"id": "MiniGrid-MemoryS7-v0", "max_episode_steps": 6}, "truncated", "minigrid"),
    Case("memory_gym", {"id": "MortarMayhem-Grid-v0", "max_episode_steps": 6}, "truncated", "memory_gym", 14),
    Case("treechop", {"backend": "crafter", "max_episode_steps": 6}, "truncated", "crafter", 8),
]
TASKS = [case for case in CASES if case.package is None and case.name != "popgym"]


def build(case: Case, num_envs: int = 3, **options: Any) -> EnvBase:
    if case.name not in environments.names():
        pytest.skip(f"'{case.name}' is not registered")
    if case.package is not None and importlib.util.find_spec(case.package) is None:
        pytest.skip(f"{case.package} is not installed: pip install 'cyborg-torchrl[benchmarks]'")
    return environments.get(case.name)(num_envs=num_envs, seed=0, **{**case.options, **options})


def test_every_registered_environment_has_a_case() -> None:
    shipped = {n for n in environments.names() if environments.get(n).__module__.startswith("cyborg_torchrl")}
    assert shipped <= {case.name for case in CASES}


@pytest.mark.parametrize("with_transforms", [False, True], ids=["bare", "tracked"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case, with_transforms: bool) -> None:
    env = build(case)
    if with_transforms:
        env = TransformedEnv(env, Compose(InitTracker(), RewardSum()))
    findings = check_environment(env, time_limit=case.time_limit, num_steps=case.num_steps)
    env.close()
    text = "\n".join(map(str, findings))
    assert not [finding for finding in findings if finding.verdict == "broken"], text
    needed = {"specs", "shapes", "seeds", "no_shift", "wrapper", "ends", "partial_reset"}
    needed |= {"length"} if case.time_limit == "truncated" else set()
    assert needed <= {finding.name for finding in findings if finding.verdict == "ok"}, text


@pytest.mark.parametrize("case", TASKS, ids=str)
def test_length_follows_the_horizon(case: Case) -> None:
    """The longest episode that any one action makes, at two horizons."""
    lengths = {}
    for horizon in (5, 12):
        env = build(case, horizon=horizon)
        most = env.max_episode_steps
        played = []
        for action in range(env.action_spec.space.n):

            def always(seen: Tensor, action: int = action) -> Tensor:
                return torch.full(seen.shape[:-1], action)

            policy = TensorDictModule(always, in_keys=["observation"], out_keys=["action"])
            rollout = env.rollout(most + 5, policy, break_when_all_done=True, break_when_any_done=False)
            played.append(rollout.shape[1])
        assert max(played) == most
        assert env.horizon == horizon
        lengths[horizon] = most
    assert lengths[12] - lengths[5] == 7 * case.growth


@pytest.mark.parametrize("case", TASKS, ids=str)
def test_the_oracle_acts_on_the_present_state(case: Case) -> None:
    """Through a collector and several episodes: any shift between what is seen and what is judged would cost it."""
    env = build(case, num_envs=16)
    assert isinstance(env, MemoryTask)
    steps = 3 * env.max_episode_steps
    options = {"frames_per_batch": 16 * steps, "total_frames": 16 * steps, "auto_register_policy_transforms": True}
    collector = Collector(env, oracle_policy(env), **options)
    for rollout in collector:
        done = rollout["next", "done"]
        assert done.sum() >= 3 * 16
        assert (rollout["next", "success"][done] == 1).all()
    collector.shutdown()


def agent_for(env: EnvBase) -> PPOAgent:
    encoder = build_encoder(env.observation_spec, batch_dims=1, features=8, convolutions="nature")
    return PPOAgent(encoder, Backbone(build_gru(8, hidden_size=8)), env.action_spec, batch_dims=1)


def ours(env: EnvBase, agent: PPOAgent, frames: int) -> TensorDictBase:
    collector = RolloutCollector(
        env, agent, frames_per_batch=frames, total_frames=frames, value_operator=agent.get_value_operator()
    )
    return next(iter(collector)).steps


def theirs(env: EnvBase, agent: PPOAgent, frames: int) -> TensorDictBase:
    collector = Collector(
        env, agent, frames_per_batch=frames, total_frames=frames, auto_register_policy_transforms=True
    )
    return next(iter(collector)).clone()


@pytest.mark.parametrize("collect", [ours, theirs], ids=["rollout_collector", "torchrl_collector"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_collectors(case: Case, collect: Callable[[EnvBase, PPOAgent, int], TensorDictBase]) -> None:
    env = TransformedEnv(build(case), InitTracker())
    steps = case.num_steps or 20
    agent = agent_for(env)
    rollout = collect(env, agent, 3 * steps)
    if not env.is_closed:  # by the collector
        env.close()
    assert rollout.shape == (3, steps)
    assert rollout["next", "reward"].shape == (3, steps, 1)
    is_over = rollout["next", "done"][:, :-1]
    assert torch.equal(rollout["is_init"][:, 1:], is_over)
    for key in agent.encoder.in_keys:
        shown, acted_on = rollout.get(("next", key))[:, :-1], rollout.get(key)[:, 1:]
        carried = ~is_over.squeeze(-1)
        assert torch.equal(shown[carried], acted_on[carried])
    assert torch.isfinite(rollout["action_log_prob"]).all()
