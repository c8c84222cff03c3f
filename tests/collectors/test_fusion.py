"""Steps on tensors: bit by bit what TorchRL's collector yields, or a reason why not."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from tensordict import NonTensorStack, TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, Composite, NonTensor, Unbounded
from torchrl.envs import EnvBase, InitTracker, TransformedEnv
from torchrl.modules import ProbabilisticActor

from cyborg_torchrl.collectors import FusedCollector, RolloutCollector
from cyborg_torchrl.collectors.fused_policy import _logsumexp
from cyborg_torchrl.config import load_config
from cyborg_torchrl.training.builders import build_agent, build_buffer, build_env

STEPS = 70  # more than one block of steps, and a part of one
CASES = [
    ["env=delayed_cue", "env.horizon=5", "backbone=lru"],
    ["env=copy_memory", "env.level=easy", "env.horizon=3", "backbone=mamba_gru", "backbone.hidden_size=16"],
    ["env=tmaze", "env.horizon=6", "backbone=lstm", "backbone.num_layers=2"],  # with clipped rewards
    ["env=tmaze", "env.horizon=6", "transforms.reward_scale=0.3", "transforms.previous_action=true"],
    ["env=distractor_nav", "env.level=easy", "env.horizon=4", "backbone=gru", "memory=pmm", "fusion.gate=true"],
    ["env=n_back", "env.level=easy", "env.horizon=9", "backbone=pseudo_mamba", "backbone.learn_initial_state=true"],
    ["env=multi_cue_delay", "env.level=easy", "env.horizon=3", "train.recurrent_mode=none"],
]
GYMNASIUM_CASES = [
    ["env=gymnasium", "id=CartPole-v1", "transforms.previous_action=true", "transforms.first_step=true"],
    ["env=gymnasium", "id=Pendulum-v1", "env.max_episode_steps=31"],  # noise, both normalisations, truncations
    ["env=gymnasium", "id=Blackjack-v1", "transforms.reward_scale=0.5"],  # a tuple of categories, short episodes
    ["env=gymnasium", "id=FrozenLake-v1", "transforms.clip_reward=0.5"],  # one category
]


def parts(options: list[str], num_envs: int = 3):
    torch.manual_seed(0)
    cfg = load_config(overrides=[*options, f"env.num_envs={num_envs}", f"train.n_steps={STEPS}"])
    env = build_env(cfg)
    return cfg, env, build_agent(cfg, env)


def collector(kind: type[Collector], options: list[str], *, actor_alone: bool = False, **more) -> Collector:
    _, env, agent = parts(options)
    frames = STEPS * env.batch_size[0]
    policy = agent.get_policy_operator() if actor_alone else agent
    more = {"frames_per_batch": frames, "total_frames": 3 * frames, "auto_register_policy_transforms": True, **more}
    if kind is FusedCollector:  # with it only the last digits differ: test_compiled_step.py
        more["compiled_step"] = False
    made = kind(env, policy, **more)
    made.set_seed(3)
    torch.manual_seed(5)
    return made


def batches(kind: type[Collector], options: list[str], **more) -> list[TensorDictBase]:
    """All batches; one collector after the other, since both draw from the same random numbers."""
    return [batch.clone() for batch in collector(kind, options, **more)]


def assert_equal(ours: TensorDictBase, theirs: TensorDictBase) -> None:
    assert ours.batch_size == theirs.batch_size
    assert ours.names == theirs.names
    names = {str(key) for key in theirs.keys(True, True)}
    assert {str(key) for key in ours.keys(True, True)} == names
    for key in theirs.keys(True, True):
        assert (ours[key].shape, ours[key].dtype) == (theirs[key].shape, theirs[key].dtype), key
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0, equal_nan=True)  # NaN: no success reported


@pytest.mark.parametrize("options", CASES, ids=lambda options: options[0])
def test_batches_equal_torchrls_bit_by_bit(options: list[str]) -> None:
    assert not collector(FusedCollector, options).why_not_fused
    for ours, theirs in zip(batches(FusedCollector, options), batches(Collector, options), strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("options", GYMNASIUM_CASES, ids=lambda options: options[1])
def test_batches_of_gymnasium_equal_torchrls_bit_by_bit(options: list[str]) -> None:
    pytest.importorskip("gymnasium")
    test_batches_equal_torchrls_bit_by_bit(options)


@pytest.mark.parametrize(
    "more",
    [
        {"actor_alone": True},
        {"reset_at_each_iter": True},
        {"track_traj_ids": False},
        {"set_truncated": True},
        {"return_same_td": True},
        {"split_trajs": True},
        {"init_random_frames": 3 * STEPS},
        {"total_frames": 5 * STEPS},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:split_trajs=True", "ignore:total_frames")
def test_options_do_what_they_do_there(more: dict) -> None:
    ours, theirs = (batches(kind, CASES[0], **more) for kind in (FusedCollector, Collector))
    assert len(ours) == (2 if "total_frames" in more else 3)
    for a, b in zip(ours, theirs, strict=True):
        assert_equal(a, b)


def test_what_was_yielded_stays() -> None:
    first, second, _ = collector(FusedCollector, CASES[0])
    theirs = batches(Collector, CASES[0])
    assert_equal(first, theirs[0])
    assert_equal(second, theirs[1])


def test_it_goes_on_from_a_state_dict() -> None:
    made = collector(FusedCollector, CASES[0])
    next(iter(made))
    other = collector(FusedCollector, CASES[0])
    other.load_state_dict(made.state_dict())
    assert other._frames == made._frames == 3 * STEPS
    assert len(list(other)) == 2


def test_weights_that_are_replaced_are_used() -> None:
    made = collector(FusedCollector, CASES[0])
    iterator = iter(made)
    next(iterator)
    agent = made._orig_policy
    new = {name: torch.randn_like(value) for name, value in agent.state_dict().items()}
    agent.load_state_dict(new)
    after = next(iterator)
    with torch.no_grad():
        first = agent.get_value_operator()(after[:, 0].clone()).get("state_value")
    torch.testing.assert_close(after["state_value"][:, 0], first)


@pytest.mark.parametrize("backbone", ["lru", "gru", "lstm", "mamba", "mamba2", "pseudo_mamba"])
@pytest.mark.parametrize("kind", [FusedCollector, Collector, RolloutCollector])
def test_what_a_fused_optimiser_changed_is_used(kind: type, backbone: str) -> None:
    """It leaves no trace on the parameters, which whatever is kept of them would have to be told by."""
    _, env, agent = parts(["env=delayed_cue", "env.horizon=5", f"backbone={backbone}", "backbone.hidden_size=16"])
    frames = STEPS * env.batch_size[0]
    more = (
        {"value_operator": agent.get_value_operator()}
        if kind is RolloutCollector
        else {"auto_register_policy_transforms": True}
    )
    made = kind(env, agent, frames_per_batch=frames, total_frames=3 * frames, **more)
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.05, fused=True)
    iterator = iter(made)
    for _ in range(2):
        rollout = next(iterator)
        for parameter in agent.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    rollout = next(iterator)
    steps = rollout.steps if kind is RolloutCollector else rollout
    states = rollout.stored_states[:, 0] if kind is RolloutCollector else rollout[:, 0].select("memory_state")
    first = steps[:, 0].select("observation", "is_init").update(states)
    with torch.no_grad():
        expected = copy.deepcopy(agent).get_value_operator()(first).get("state_value")
    torch.testing.assert_close(steps["state_value"][:, 0], expected)


class Doubled(ProbabilisticTensorDictSequential):
    """Has a forward of its own."""

    def forward(self, tensordict: TensorDictBase, *args, **kwargs) -> TensorDictBase:
        return super().forward(tensordict, *args, **kwargs).set("doubled", 2 * tensordict["logits"])


class Named(torch.nn.Module):
    """Returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.inner(x)}


def unusual(kind: str):
    torch.manual_seed(1)
    network, reads, keys_ = torch.nn.Linear(6, 4), ["logits"], ["logits"]
    if kind == "renamed":
        keys_, reads = ["my_logits"], {"logits": "my_logits"}
    sampler = {
        "in_keys": reads,
        "out_keys": ["action"],
        "distribution_class": torch.distributions.Categorical,
        "return_log_prob": True,
    }
    module = TensorDictModule(Named() if kind == "dict" else network, in_keys=["observation"], out_keys=keys_)
    if kind == "hook":
        module.register_forward_hook(lambda module, inputs, output: output.set("logits", -output["logits"]))
    if kind == "safe":
        spec = Bounded(0, 2, (3,), dtype=torch.long)
        return ProbabilisticActor(module, spec=spec, safe=True, **sampler)
    parts_ = (module, ProbabilisticTensorDictModule(**sampler))
    return Doubled(*parts_) if kind == "forward" else ProbabilisticTensorDictSequential(*parts_)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("renamed", ""),
        ("dict", ""),
        ("hook", "a TensorDictModule with hooks"),
        ("safe", "a SafeProbabilisticModule with hooks"),
        ("forward", "a Doubled with a forward of its own"),
    ],
)
def test_unusual_policies_are_run_alike_or_left_to_torchrl(kind: str, reason: str) -> None:
    found = []
    for made_by in (FusedCollector, Collector):
        _, env, _ = parts(CASES[0])
        made = made_by(env, unusual(kind), frames_per_batch=STEPS * 3, total_frames=2 * STEPS * 3)
        made.set_seed(3)
        torch.manual_seed(5)
        found.append([batch.clone() for batch in made])
        if made_by is FusedCollector:
            assert reason in made.why_not_fused
            assert bool(made.why_not_fused) == bool(reason)
    for ours, theirs in zip(*found, strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("kind", [FusedCollector, Collector, RolloutCollector])
def test_a_policy_that_diverged_is_not_collected_with(kind: type) -> None:
    _, env, agent = parts(CASES[0])
    more = {"value_operator": agent.get_value_operator()} if kind is RolloutCollector else {}
    if kind is Collector:
        more = {"auto_register_policy_transforms": True}
    made = kind(env, agent, frames_per_batch=STEPS * 3, total_frames=STEPS * 3, **more)
    with torch.no_grad():
        agent.policy_head.module.weight.fill_(float("nan"))
    with pytest.raises((RuntimeError, ValueError), match=r"is nan in environment 0|invalid values"):
        next(iter(made))


@pytest.mark.parametrize(
    ("excluded", "message"),
    [
        (["state_value"], "'state_value' cannot be excluded: an update needs it"),
        ([("next", "done")], "cannot be excluded"),
        (["obsrvation"], "no entry 'obsrvation' to exclude: did you mean 'observation'"),
        (["next"], "no entry 'next' to exclude"),
        ("observation", r"a sequence of keys; got 'observation'. For one: \['observation'\]"),
    ],
    ids=str,
)
def test_what_cannot_be_excluded_is_refused(excluded, message: str) -> None:
    _, env, agent = parts(CASES[0])
    frames = STEPS * 3
    with pytest.raises(ValueError, match=message):
        RolloutCollector(
            env,
            agent,
            frames_per_batch=frames,
            total_frames=frames,
            value_operator=agent.get_value_operator(),
            exclude_keys=excluded,
        )


class Wrapped(TensorDictModule):
    """Not a plain TensorDictModule."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["env=gymnasium", "env.id=CartPole-v1", "transforms.frame_stack=2"], "the environment has a CatFrames"),
        ({"exploration_type": "mode"}, "actions are not sampled"),
        ({"use_buffers": False}, "no buffers to collect into"),
        ("wrapped", "the policy has a Wrapped"),
    ],
    ids=str,
)
def test_what_cannot_be_fused_is_collected_as_torchrl_does_it_and_said_once(change, reason: str, caplog) -> None:
    options = [*CASES[0], *change] if isinstance(change, list) else CASES[0]
    if isinstance(change, list) and change[0] == "env=gymnasium":
        options = [*change, "train.recurrent_mode=burn_in"]
    more = dict(change) if isinstance(change, dict) else {}
    if "exploration_type" in more:
        from torchrl.envs.utils import ExplorationType

        more["exploration_type"] = ExplorationType.MODE
    found = {}
    with caplog.at_level(logging.WARNING):
        for kind in (FusedCollector, Collector):
            _, env, agent = parts(options)
            if change == "wrapped":
                agent.encoder = Wrapped(agent.encoder.module, agent.encoder.in_keys, agent.encoder.out_keys)
            frames = STEPS * env.batch_size[0]
            made = kind(
                env,
                agent,
                frames_per_batch=frames,
                total_frames=2 * frames,
                auto_register_policy_transforms=True,
                **({"compiled_step": False} if kind is FusedCollector else {}),
                **more,
            )
            made.set_seed(3)
            torch.manual_seed(5)
            found[kind] = list(made)
            made.shutdown()
    for ours, theirs in zip(found[FusedCollector], found[Collector], strict=True):
        assert_equal(ours, theirs)
    said = [record.message for record in caplog.records if "without fusion" in record.message]
    assert len(said) == 1
    assert reason in said[0]


@pytest.mark.parametrize(
    "options", [*CASES, *GYMNASIUM_CASES, [*CASES[0], "train=burn_in", "train.seq_len=16", "train.burn_in=4"]], ids=str
)
def test_our_collector_yields_the_same_with_and_without(options: list[str]) -> None:
    if "env=gymnasium" in options:
        pytest.importorskip("gymnasium")
    rollouts = []
    for is_fused in (True, False):
        cfg, env, agent = parts(options)
        frames = STEPS * env.batch_size[0]
        made = RolloutCollector(
            env,
            agent,
            frames_per_batch=frames,
            total_frames=3 * frames,
            value_operator=agent.get_value_operator(),
            state_steps=build_buffer(cfg, env, STEPS).state_steps,
            is_fused=is_fused,
            compiled_step=False,
        )
        assert (made._fused is not None) == is_fused
        made.set_seed(3)
        torch.manual_seed(5)
        rollouts.append(list(made))
    for ours, theirs in zip(*rollouts, strict=True):
        assert ours.state_steps == theirs.state_steps
        for a, b in ((ours.steps, theirs.steps), (ours.stored_states, theirs.stored_states)):
            assert {str(key) for key in a.keys(True, True)} == {str(key) for key in b.keys(True, True)}
            for key in b.keys(True, True):
                torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, equal_nan=True)  # NaN: no success reported


@pytest.mark.parametrize("is_fused", [True, False])
def test_entries_that_are_excluded_are_the_only_ones_missing(is_fused: bool) -> None:
    excluded = [("next", "observation"), "logits", "success", ("next", "truncated")]
    found = []
    for exclude_keys in ((), excluded):
        _, env, agent = parts(CASES[0])
        frames = STEPS * env.batch_size[0]
        made = RolloutCollector(
            env,
            agent,
            frames_per_batch=frames,
            total_frames=frames,
            value_operator=agent.get_value_operator(),
            exclude_keys=exclude_keys,
            is_fused=is_fused,
        )
        made.set_seed(3)
        torch.manual_seed(5)
        found.append(made.rollout().steps)
    whole, kept = found
    assert_equal(kept, whole.exclude(*excluded))
    assert ("next", "success") in kept.keys(True, True)


class Spoken(EnvBase):
    """Shows a text beside its observation."""

    def __init__(self) -> None:
        super().__init__(batch_size=[3])
        self.observation_spec = Composite(observation=Unbounded((3, 6)), text=NonTensor((3,)), shape=(3,))
        self.action_spec = Categorical(4, shape=(3,))
        self.reward_spec = Unbounded((3, 1))

    def _shown(self) -> TensorDict:
        return TensorDict({"observation": torch.randn(3, 6), "text": NonTensorStack("a", "b", "c")}, [3])

    def _reset(self, tensordict=None, **options) -> TensorDictBase:
        return self._shown()

    def _step(self, tensordict) -> TensorDictBase:
        return self._shown().update({"reward": torch.ones(3, 1), "done": torch.zeros(3, 1, dtype=torch.bool)})

    def _set_seed(self, seed) -> None: ...


def test_what_is_no_tensor_is_left_to_torchrl() -> None:
    _, _, agent = parts(CASES[0])
    made = RolloutCollector(
        TransformedEnv(Spoken(), InitTracker()),
        agent,
        frames_per_batch=6,
        total_frames=6,
        value_operator=agent.get_value_operator(),
    )
    assert made._fused is None
    assert made.rollout().steps["observation"].shape == (3, 2, 6)


def test_the_log_of_sums_is_torchs_bit_by_bit() -> None:
    for scale in (1e-3, 1.0, 50.0):
        logits = scale * torch.randn(1000, 7)
        assert torch.equal(_logsumexp(logits), logits.logsumexp(-1, keepdim=True))


@pytest.mark.parametrize("steps", [12, 20])  # in one block of writes, and in two
@pytest.mark.parametrize("kind", [FusedCollector, RolloutCollector])
def test_every_init_tracker_marks_the_starts_of_episodes(kind, steps) -> None:
    rollouts = []
    for each in (Collector, kind):
        _, env, agent = parts(["env=delayed_cue", "env.horizon=3", "backbone=gru"])
        env.append_transform(InitTracker(init_key="begins"))
        options = {"frames_per_batch": 3 * steps, "total_frames": 3 * steps}
        more = {"auto_register_policy_transforms": True}
        if each is RolloutCollector:
            more = {"value_operator": agent.get_value_operator()}
        rollout = next(iter(each(env, agent, **options, **more)))
        rollouts.append(getattr(rollout, "steps", rollout))
    expected, ours = rollouts
    assert torch.equal(ours["begins"], expected["begins"])
    assert torch.equal(ours["begins"], ours["is_init"])
