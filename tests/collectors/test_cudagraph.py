"""A captured policy step: the memory that a graph reads and writes, with a stand-in for it where there is no CUDA."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from recorded_operations import Launches, Recording, replace_everywhere
from torch.nn import functional as F
from torchrl.envs import RewardClipping

from cyborg_torchrl.collectors import FusedCollector, RolloutCollector
from cyborg_torchrl.collectors.cudagraph import GraphedPolicy, GraphedTask, with_graph
from cyborg_torchrl.collectors.flat_dict import FlatDict
from cyborg_torchrl.collectors.fused_env import FusedEnv
from cyborg_torchrl.collectors.fused_policy import FusedPolicy
from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.cores.kernels import native
from cyborg_torchrl.envs import MemoryTask
from cyborg_torchrl.envs.make import tracked
from cyborg_torchrl.registry import environments
from cyborg_torchrl.training.builders import build_agent, build_env, build_trainer

STEPS, ENVS = 40, 3
OPTIONS = ["env=delayed_cue", "env.horizon=5", f"env.num_envs={ENVS}", f"train.n_steps={STEPS}", "backbone=lstm"]


class StandIn:
    """What a CUDA graph does, on a CPU: writes where it wrote when it was captured, from where it read then."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, run, load):
        del load
        self.captures += 1
        random_state = torch.get_rng_state()  # capturing computes nothing
        places: FlatDict = dict(run())
        torch.set_rng_state(random_state)

        return lambda: self._replay(run, places)

    @staticmethod
    def _replay(run, places: FlatDict) -> None:
        owner: GraphedPolicy = run.__self__
        for key, value in run().items():
            places[key].copy_(value)
        owner._outputs = places


def batches(device: str, *, cudagraph: bool, stand_in: StandIn | None = None):
    torch.manual_seed(0)
    cfg = load_config(overrides=[*OPTIONS, f"train.device={device}"])
    env = build_env(cfg)
    agent = build_agent(cfg, env)
    frames = STEPS * ENVS
    on_cuda = cudagraph and stand_in is None
    made = FusedCollector(env, agent, frames_per_batch=frames, total_frames=3 * frames, cudagraph=on_cuda)
    if stand_in is not None:
        policy, step = made._fused
        made._fused = (GraphedPolicy(policy, stand_in), step)
    made.set_seed(3)
    torch.manual_seed(5)
    for batch in made:
        yield batch.clone()
        with torch.no_grad():  # an update: what depends on parameters has to be computed anew
            for parameter in agent.parameters():
                parameter.mul_(0.9)
    if on_cuda:
        steps = made._fused[0]
        assert isinstance(steps, GraphedTask)
        assert steps._policy_alone is None, "the task is in the graph"


def assert_equal(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for key in b.keys(True, True):
            assert torch.equal(a[key], b[key]), key


def test_a_captured_step_yields_what_the_policy_does() -> None:
    stand_in = StandIn()
    graphed = list(batches("cpu", cudagraph=True, stand_in=stand_in))
    assert_equal(graphed, list(batches("cpu", cudagraph=False)))
    assert stand_in.captures == 3  # once a rollout


def test_the_default_collector_yields_the_same_with_a_captured_step() -> None:
    rollouts = []
    for stand_in in (None, StandIn()):
        torch.manual_seed(0)
        trainer, _, _ = build_trainer(load_config(overrides=[*OPTIONS, "train.total_timesteps=240"]))
        collector = trainer.collector
        if stand_in is not None:
            policy, step = collector._fused
            collector._fused = GraphedPolicy(policy, stand_in), step
        torch.manual_seed(5)
        rollouts.append([collector.rollout() for _ in range(2)])
    assert stand_in is not None
    assert stand_in.captures == 2
    for found, expected in zip(*rollouts, strict=True):
        assert_equal([found.steps, found.stored_states], [expected.steps, expected.stored_states])


def test_what_was_written_stays_when_the_next_step_overwrites_the_graphs_memory() -> None:
    cfg = load_config(overrides=OPTIONS)
    env = build_env(cfg)
    agent = build_agent(cfg, env)
    made = FusedCollector(env, agent, frames_per_batch=STEPS * ENVS, total_frames=-1)
    policy = GraphedPolicy(FusedPolicy(agent), StandIn())
    carried = dict(made._carrier.items(True, True))
    policy.begin(ENVS)
    with torch.no_grad():
        first = policy(carried)
        kept = {key: value.clone() for key, value in first.items()}
        policy({**carried, "observation": torch.randn_like(carried["observation"])})
    for key, value in kept.items():
        assert torch.equal(first[key], value), key


SMALL = {
    "delayed_cue": {"horizon": 3},
    "tmaze": {"horizon": 4},
    "copy_memory": {"horizon": 2, "sequence": 3},
    "permuted_copy": {"horizon": 2, "sequence": 3},
    "n_back": {"horizon": 5, "n": 2},
    "assoc_recall": {"horizon": 2, "pairs": 2},
    "multi_cue_delay": {"horizon": 2, "cues": 2},
    "pattern_binding": {"horizon": 2, "patterns": 3},
    "distractor_nav": {"horizon": 2, "distractors": 2},
    "endless_tmaze": {"horizon": 2, "corridors": 2, "random_lengths": True},
    "color_cubes": {"horizon": 1, "cubes": 2, "grid": 2},
}
"""Options with which several episodes end in a rollout."""
TOGETHER = [*SMALL][:8]
"""Tasks whose episodes end together."""
CALLS: list[Recording] = []


def recorded(run, load):
    """A stand-in for CUDA graphs that repeats the recorded operations, without running Python."""
    for _ in range(2):  # the warm-up of a CUDA graph takes steps, too
        random_state = torch.get_rng_state()
        try:
            load()
            run()
        finally:
            torch.set_rng_state(random_state)
    CALLS.append(Recording.of(run))
    return CALLS[-1].replay


def collector_of(name: str, capture=None) -> RolloutCollector:
    torch.manual_seed(0)
    task = environments.get(name)(ENVS, seed=2, **SMALL[name])
    env, cfg = tracked(task, [RewardClipping(-0.5, 0.5)]), load_config(overrides=["backbone=gru"])
    agent = build_agent(cfg, env)
    made = RolloutCollector(
        env, agent, frames_per_batch=STEPS * ENVS, total_frames=2 * STEPS * ENVS,
        value_operator=agent.get_value_operator(), compiled_step=False,
    )  # fmt: skip
    if capture is not None:
        policy, step = made._fused
        made._fused = (GraphedTask(policy, step, step.task, capture),) * 2
    torch.manual_seed(5)
    return made


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step consist of torch's operations, which a recording sees, as they are on a GPU."""

    def one_hot(index: torch.Tensor, size: int) -> torch.Tensor:  # on a CPU, torch's reads the greatest number
        return torch.zeros(*index.shape, size, dtype=torch.long).scatter_(-1, index.unsqueeze(-1), 1)

    replace_everywhere(monkeypatch, native.is_native, lambda tensor: False)
    monkeypatch.setattr(F, "one_hot", one_hot)
    CALLS.clear()


def test_all_memory_tasks_are_tested() -> None:
    builders = [environments.get(name) for name in environments.names()]
    tasks = {builder for builder in builders if inspect.isclass(builder) and issubclass(builder, MemoryTask)}
    assert tasks == {environments.get(name) for name in SMALL}


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("name", SMALL)
def test_a_task_in_the_graph_changes_no_rollout(name: str) -> None:
    expected = [*collector_of(name)]
    found = [*collector_of(name, recorded)]
    assert len(CALLS) == 2, "one graph a rollout"
    done = expected[0].steps["next", "done"]
    assert done.sum() >= 2 * ENVS, "each environment begins several episodes"
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal([ours.steps, ours.stored_states], [theirs.steps, theirs.stored_states])


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("name", ["delayed_cue", "color_cubes"])
def test_the_environment_continues_where_a_graph_has_left_it(name: str) -> None:
    """State and generator are those after a rollout without a graph, and a restart in between is seen."""
    states, rollouts = [], []
    for capture in (None, recorded):
        made = collector_of(name, capture)
        made.rollout()
        task = made.env.base_env
        states.append(task.get_state())
        task.restart(torch.arange(ENVS) == 1)  # from now on, episodes do not end together
        rollouts.append(made.rollout())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=0)
    assert_equal([rollouts[1].steps], [rollouts[0].steps])


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("name", SMALL)
def test_a_step_of_the_graph_waits_for_nothing(name: str) -> None:
    made = collector_of(name, recorded)
    both, _ = made._fused
    carried = dict(made._carried.items(True, True))
    with torch.no_grad():
        both.begin(ENVS)
        written = both(carried)
        with Launches() as launches:
            after, carried, is_over = both.step(carried, written)
        with Launches() as replay:
            both(carried)
    assert is_over is None
    assert not after["done"].any()
    assert len(replay.launches) > 50
    assert replay.waiting == []
    # Where episodes may end at any time, the CPU reads if one has ended.
    assert len(launches.waiting) == (0 if name in TOGETHER else 1)


@pytest.mark.usefixtures("operations")
def test_a_fused_collector_takes_the_task_into_the_graph() -> None:
    rollouts = []
    for capture in (None, recorded):
        torch.manual_seed(0)
        cfg = load_config(overrides=OPTIONS)
        env = build_env(cfg)
        agent = build_agent(cfg, env)
        made = FusedCollector(env, agent, frames_per_batch=STEPS * ENVS, total_frames=-1, compiled_step=False)
        if capture is not None:
            policy, step = made._fused
            made._fused = (GraphedTask(policy, step, step.task, capture),) * 2
        made.set_seed(3)
        torch.manual_seed(5)
        rollouts.append([made.rollout() for _ in range(2)])
    assert_equal(*rollouts)


@pytest.mark.usefixtures("operations")
def test_a_task_that_cannot_be_captured_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    def only_policies(run, load):
        replay = recorded(run, load)
        if isinstance(run.__self__, GraphedTask):
            raise RuntimeError("operation not permitted when stream is capturing")
        return replay

    expected = [*collector_of("tmaze")]
    with caplog.at_level(logging.WARNING):
        found = [*collector_of("tmaze", only_policies)]
    (record,) = [record for record in caplog.records if "cudagraph" in record.message]
    assert "not permitted when stream is capturing" in record.message
    assert_equal([rollout.steps for rollout in found], [rollout.steps for rollout in expected])


@pytest.mark.usefixtures("operations")
def test_a_task_whose_latents_change_their_type_stays_outside(monkeypatch, caplog) -> None:
    """A graph would write them back in their old type."""
    task = environments.get("tmaze")
    judge = task._judge

    def with_floats(self, action, time, latents):
        latents["goal"] = latents["goal"] / 1
        return judge(self, action, time, latents)

    monkeypatch.setattr(task, "_judge", with_floats)
    expected = [*collector_of("tmaze")]
    with caplog.at_level(logging.WARNING):
        found = [*collector_of("tmaze", recorded)]
    assert "'goal' of the environment changes from torch.int64 to torch.float32" in caplog.text
    assert_equal([rollout.steps for rollout in found], [rollout.steps for rollout in expected])


@pytest.mark.parametrize("has_transform", [False, True])
def test_what_a_graph_takes_in_on_a_gpu(has_transform: bool) -> None:
    """Transforms of the package may have numbers that a graph would not change."""
    cfg = load_config(overrides=[*OPTIONS, f"transforms.previous_action={has_transform}"])
    env = build_env(cfg)
    policy, step = FusedPolicy(build_agent(cfg, env)), FusedEnv(env)
    gpu = [torch.device("cuda", 0)]
    both = with_graph(policy, step, gpu, None)
    assert [type(part) for part in both] == ([GraphedPolicy, FusedEnv] if has_transform else [GraphedTask] * 2)
    assert with_graph(policy, step, gpu, False) == with_graph(policy, step, [torch.device("cpu")], None)
    assert with_graph(policy, step, gpu, False) == (policy, step)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs that there is no CUDA device")
def test_without_cuda_a_graph_is_refused() -> None:
    cfg = load_config(overrides=OPTIONS)
    env = build_env(cfg)
    with pytest.raises(ValueError, match=r"cudagraph needs a policy that can be fused, .* here are cpu"):
        FusedCollector(env, build_agent(cfg, env), frames_per_batch=STEPS * ENVS, total_frames=-1, cudagraph=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs that there is no CUDA device")
def test_a_configuration_asks_for_a_graph() -> None:
    asks = [*OPTIONS, "collector=fused"]
    with pytest.raises(ConfigError, match=r"cudagraph needs train\.device=cuda; the device here is 'cpu'"):
        load_config(overrides=[*asks, "collector.cudagraph=true"])
    cfg = load_config(overrides=asks)
    cfg.collector.cudagraph = True  # as where there is a device
    with pytest.raises(ConfigError, match=r"collector\.cudagraph: .* here are cpu"):
        build_trainer(cfg)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_graph_yields_what_the_policy_does() -> None:
    assert_equal(list(batches("cuda", cudagraph=True)), list(batches("cuda", cudagraph=False)))
