"""A captured policy step: the memory that a graph reads and writes, with a stand-in for it where there is no CUDA."""

from __future__ import annotations

import pytest
import torch

from cyborg_torchrl.collectors import FusedCollector
from cyborg_torchrl.collectors.cudagraph import GraphedPolicy
from cyborg_torchrl.collectors.flat_dict import FlatDict
from cyborg_torchrl.collectors.fused_policy import FusedPolicy
from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.training.builders import build_agent, build_env, build_trainer

STEPS, ENVS = 40, 3
OPTIONS = ["env=delayed_cue", "env.horizon=5", f"env.num_envs={ENVS}", f"train.n_steps={STEPS}", "backbone=lstm"]


class StandIn:
    """What a CUDA graph does, on a CPU: writes where it wrote when it was captured, from where it read then."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, run):
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
