"""The delayed cue task against its rules, worked out by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs.utils import check_env_specs

import cyborg_torchrl.envs
from cyborg_torchrl.envs import DelayedCueEnv, memoryless_policy, oracle_policy
from cyborg_torchrl.registry import environments

FLAGS = ("done", "terminated", "truncated")
BLANK, QUERY = [0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]


def cue_of(observation: Tensor) -> Tensor:
    """The cue that an observation of the first step shows; checks that it shows one and nothing else."""
    assert (observation[..., -2] == 1).all()
    assert (observation[..., -1] == 0).all()
    assert (observation[..., :-2].sum(-1) == 1).all()
    return observation[..., :-2].argmax(-1)


def act(env: DelayedCueEnv, tensordict: TensorDictBase, action: Tensor) -> TensorDictBase:
    """One step without reset; returns what comes next, to be acted on."""
    return env.step(tensordict.set("action", action))["next"]


def reset_only(env: DelayedCueEnv, tensordict: TensorDictBase, index: int) -> TensorDictBase:
    """Resets one environment."""
    is_reset = torch.zeros(*env.batch_size, 1, dtype=torch.bool)
    is_reset[index] = True
    return env.reset(tensordict.exclude("reward").set("_reset", is_reset))


def play(env: DelayedCueEnv, policy: object, batches: int) -> TensorDictBase:
    """The query steps of so many batches of episodes, played through automatic resets, [N, batches]."""
    steps = env.max_episode_steps
    rollout = env.rollout(batches * steps, policy, break_when_any_done=False)
    ends = rollout["next", "done"].squeeze(-1).nonzero()[:, 1].cpu()
    assert torch.equal(ends % steps, torch.full((64 * batches,), steps - 1))
    return rollout[:, steps - 1 :: steps]


@pytest.mark.parametrize("horizon", [0, 1, 7])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_specs_hold(num_envs: int, horizon: int) -> None:
    check_env_specs(DelayedCueEnv(num_envs, cues=3, horizon=horizon, seed=0), seed=0)


def test_specs_are_as_documented() -> None:
    env = DelayedCueEnv(7, cues=5, horizon=3, seed=0)
    assert env.batch_size == (7,)
    assert env.observation_spec["observation"].shape == (7, 7)
    assert env.observation_spec["observation"].dtype == torch.float32
    assert env.observation_spec["success"].shape == (7, 1)
    assert env.observation_spec["success"].dtype == torch.float32
    assert env.action_spec.shape == (7,)
    assert env.action_spec.space.n == 5
    assert env.reward_spec.shape == (7, 1)
    assert {env.full_done_spec[key].shape for key in FLAGS} == {(7, 1)}


@pytest.mark.parametrize("horizon", [0, 1, 5])
def test_episode_by_hand(horizon: int) -> None:
    env = DelayedCueEnv(3, cues=3, horizon=horizon, seed=0)
    tensordict = env.reset()
    cue = cue_of(tensordict["observation"])
    rows = [[float(i == c) for i in range(3)] + [1.0, 0.0] for c in cue.tolist()]
    assert tensordict["observation"].tolist() == rows

    # environment 0 answers right, but only at the query; 1 is right always but at the query; 2 is never right
    right, wrong = cue, (cue + 1) % 3
    for step in range(horizon + 1):
        tensordict = act(env, tensordict, torch.stack([wrong[0], right[1], wrong[2]]))
        assert tensordict["observation"].tolist() == [QUERY if step == horizon else BLANK] * 3
        assert tensordict["reward"].tolist() == [[0.0]] * 3
        assert not any(tensordict[key].any() for key in (*FLAGS, "success"))

    tensordict = act(env, tensordict, torch.stack([right[0], wrong[1], wrong[2]]))
    assert tensordict["reward"].tolist() == [[1.0], [-1.0], [-1.0]]
    assert tensordict["success"].tolist() == [[1.0], [0.0], [0.0]]
    assert tensordict["done"].all()
    assert tensordict["terminated"].all()
    assert not tensordict["truncated"].any()


@pytest.mark.parametrize("horizon", [0, 1, 5, 40])
def test_horizon_is_the_number_of_blank_steps(horizon: int) -> None:
    env = DelayedCueEnv(2, horizon=horizon, seed=0)
    assert (env.horizon, env.max_episode_steps) == (horizon, horizon + 2)
    rollout = env.rollout(100)
    assert rollout.shape == (2, horizon + 2)
    is_blank = (rollout["observation"] == 0).all(-1)
    assert is_blank.sum(-1).tolist() == [horizon] * 2
    assert rollout["next", "done"].sum(1).tolist() == [[1]] * 2


def test_default_horizon() -> None:
    assert DelayedCueEnv().max_episode_steps == 1002


def test_partial_reset_leaves_the_others_untouched() -> None:
    """Environment 1 starts anew at step 3; the others reach their query unmoved, and each keeps its own cue."""
    env = DelayedCueEnv(3, cues=3, horizon=4, seed=0)
    tensordict = env.reset()
    cue = cue_of(tensordict["observation"])
    for _ in range(3):
        tensordict = act(env, tensordict, torch.zeros(3, dtype=torch.long))
    tensordict = reset_only(env, tensordict, 1)
    cue[1] = cue_of(tensordict["observation"][1])
    assert tensordict["observation"][[0, 2]].tolist() == [BLANK] * 2

    ended_at = [None] * 3
    for step in range(3, 9):
        expected = [QUERY if step == 5 else BLANK] * 3
        expected[1] = QUERY if step == 8 else BLANK
        for i in (0, 1, 2) if step > 3 else (0, 2):
            if ended_at[i] is None:
                assert tensordict["observation"][i].tolist() == expected[i]
        tensordict = act(env, tensordict, cue)
        for i in tensordict["done"].squeeze(-1).nonzero().flatten().tolist():
            ended_at[i] = step
            assert tensordict["success"][i]
    assert ended_at == [5, 8, 5]


def test_partial_reset_keeps_the_ending_of_the_others() -> None:
    env = DelayedCueEnv(2, horizon=0, seed=0)
    tensordict = env.reset()
    cue = cue_of(tensordict["observation"])
    tensordict = act(env, act(env, tensordict, cue), cue)
    assert tensordict["done"].all()
    tensordict = reset_only(env, tensordict, 0)
    assert tensordict["done"].tolist() == [[False], [True]]
    assert tensordict["success"].tolist() == [[0.0], [1.0]]


def test_partial_reset_draws_new_cues() -> None:
    env = DelayedCueEnv(2, cues=4, horizon=3, seed=0)
    tensordict = env.reset()
    seen = set()
    for _ in range(100):
        tensordict = reset_only(env, tensordict, 0)
        seen.add(int(cue_of(tensordict["observation"][0])))
    assert seen == {0, 1, 2, 3}


def cues_drawn(env: DelayedCueEnv, resets: int = 4) -> list[int]:
    return torch.cat([cue_of(env.reset()["observation"]) for _ in range(resets)]).tolist()


def test_seed_reproduces() -> None:
    first = cues_drawn(DelayedCueEnv(64, seed=3))
    assert cues_drawn(DelayedCueEnv(64, seed=3)) == first
    assert cues_drawn(DelayedCueEnv(64, seed=4)) != first
    env = DelayedCueEnv(64, seed=9)
    env.set_seed(3)
    assert cues_drawn(env) == first


def test_seed_reproduces_a_rollout_with_resets() -> None:
    first, second = (
        play(DelayedCueEnv(64, horizon=2, seed=3), memoryless_policy(DelayedCueEnv(64)), 5) for _ in range(2)
    )
    assert torch.equal(first["next", "success"], second["next", "success"])


def test_without_seed_torch_decides() -> None:
    torch.manual_seed(1)
    first = cues_drawn(DelayedCueEnv(64))
    assert cues_drawn(DelayedCueEnv(64)) != first
    torch.manual_seed(1)
    assert cues_drawn(DelayedCueEnv(64)) == first


def test_seeded_environment_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    env = DelayedCueEnv(8, horizon=1, seed=0)
    env.rollout(6, oracle_policy(env), break_when_any_done=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_copies_go_on_alike() -> None:
    env = DelayedCueEnv(64, seed=0)
    env.reset()
    twins = copy.deepcopy(env), pickle.loads(pickle.dumps(env))
    expected = cues_drawn(env)
    assert [cues_drawn(twin) for twin in twins] == [expected] * 2


@pytest.mark.parametrize("cues", [2, 4, 5])
def test_cues_are_uniform_and_independent(cues: int) -> None:
    env = DelayedCueEnv(500, cues=cues, seed=0)
    first, second = (cue_of(env.reset()["observation"]) for _ in range(2))
    drawn = torch.tensor(cues_drawn(env, 20))
    share = torch.bincount(drawn, minlength=cues) / drawn.numel()
    p = 1 / cues
    assert len(share) == cues
    assert (share - p).abs().max() < 4 * (p * (1 - p) / drawn.numel()) ** 0.5
    # from one episode to the next, and from one environment to its neighbour
    for is_same in (first == second, first[1:] == first[:-1]):
        assert abs(float(is_same.float().mean()) - p) < 4 * (p * (1 - p) / is_same.numel()) ** 0.5


@pytest.mark.parametrize("horizon", [0, 1, 20])
def test_oracle_always_succeeds(horizon: int) -> None:
    env = DelayedCueEnv(64, cues=5, horizon=horizon, seed=0)
    query = play(env, oracle_policy(env), 4)
    assert query.numel() == 256
    assert query["next", "success"].all()
    assert (query["next", "reward"] == 1).all()


@pytest.mark.parametrize("horizon", [0, 1, 20])
@pytest.mark.parametrize("cues", [2, 4])
def test_memoryless_is_at_chance(cues: int, horizon: int) -> None:
    env = DelayedCueEnv(64, cues=cues, horizon=horizon, seed=0)
    query = play(env, memoryless_policy(env), 10)
    success = query["next", "success"].float()
    p = 1 / cues
    assert abs(float(success.mean()) - p) < 4 * (p * (1 - p) / query.numel()) ** 0.5
    assert torch.equal(query["next", "reward"], 2 * success - 1)


def test_query_does_not_tell_the_cue() -> None:
    """At a query every environment is shown the same, whatever its cue and history."""
    env = DelayedCueEnv(64, cues=4, horizon=3, seed=0)
    rollout = env.rollout(5)
    assert len(set(cue_of(rollout["observation"][:, 0]).tolist())) == 4
    after = rollout["observation"][:, 1:]
    assert torch.equal(after, after[:1].expand_as(after))


def test_success_and_reward_come_only_at_the_query() -> None:
    env = DelayedCueEnv(64, horizon=3, seed=0)
    rollout = env.rollout(25, oracle_policy(env), break_when_any_done=False)
    is_query = rollout["observation"][..., -1:] == 1
    assert torch.equal(rollout["next", "success"], is_query)
    assert torch.equal(rollout["next", "reward"], is_query.float())
    assert torch.equal(rollout["next", "terminated"], is_query)
    assert not rollout["success"].any()


def test_oracle_in_a_collector_whose_batches_cut_episodes() -> None:
    env = DelayedCueEnv(8, horizon=5, seed=0)
    collector = Collector(
        env, oracle_policy(env), frames_per_batch=32, total_frames=8 * 4 * 14, auto_register_policy_transforms=True
    )
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    rollout = torch.cat(batches, -1)
    done = rollout["next", "done"]
    assert done.squeeze(-1).nonzero()[:, 1].view(8, -1).tolist() == [list(range(6, 56, 7))] * 8
    assert rollout["next", "success"][done].all()


def test_what_is_returned_can_be_written_into() -> None:
    """Overwriting what environment and policy handed out changes nothing that they do later."""
    env, untouched = (DelayedCueEnv(4, horizon=1, seed=0) for _ in range(2))
    policy, untouched_policy = oracle_policy(env), oracle_policy(env)
    for _ in range(2):
        tensordict, expected = env.reset(), untouched.reset()
        for _ in range(3):
            tensordict, expected = env.step(policy(tensordict)), untouched.step(untouched_policy(expected))
            assert (tensordict == expected).all()
            following, expected = tensordict["next"].clone(), expected["next"]
            for value in tensordict.values(include_nested=True, leaves_only=True):
                value.fill_(1)
            tensordict = following
        assert expected["success"].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_envs": 0}, "num_envs must be >= 1; got 0"),
        ({"num_envs": -3}, "num_envs must be >= 1; got -3"),
        ({"cues": 1}, "cues must be >= 2; got 1"),
        ({"cues": 0}, "cues must be >= 2; got 0"),
        ({"horizon": -1}, "horizon must be >= 0; got -1"),
    ],
)
def test_bad_values(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DelayedCueEnv(**options)


@pytest.mark.parametrize("name", ["num_envs", "cues", "horizon"])
def test_fractions_are_refused(name: str) -> None:
    """ValueError by the constructor, or an error of the shape checker where that is on."""
    with pytest.raises((TypeError, ValueError), match=name):
        DelayedCueEnv(**{name: 10.5})


def test_wrong_reset_shape_is_refused() -> None:
    env = DelayedCueEnv(4, horizon=2, seed=0)
    with pytest.raises(RuntimeError):
        env.reset(TensorDict({"_reset": torch.ones(3, 1, dtype=torch.bool)}, [3]))


def test_registered_and_exported() -> None:
    assert environments.get("delayed_cue") is DelayedCueEnv
    assert cyborg_torchrl.envs.__all__ == sorted(cyborg_torchrl.envs.__all__)
    assert all(hasattr(cyborg_torchrl.envs, name) for name in cyborg_torchrl.envs.__all__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda() -> None:
    env = DelayedCueEnv(64, horizon=5, device="cuda", seed=0)
    check_env_specs(env, seed=0)
    assert play(env, oracle_policy(env), 4)["next", "success"].all()
