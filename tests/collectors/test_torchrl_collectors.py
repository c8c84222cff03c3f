"""TorchRL's collectors of several processes, and states in nested groups of keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torchrl.collectors import Collector, MultiAsyncCollector
from torchrl.data import Composite, Unbounded
from torchrl.envs import RenameTransform

from cyborg_torchrl.cores import Core
from cyborg_torchrl.data import EpisodeBuffer, RecurrentRolloutBuffer
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.objectives import RecurrentClipPPOLoss, add_advantages

NUM_ENVS, STEPS = 4, 18
FRAMES = NUM_ENVS * STEPS


def check(agent: PPOAgent, rollout) -> None:
    """Every mode sees what the rollout saw."""
    add_advantages(rollout, agent.get_value_operator(), gamma=0.99, gae_lambda=0.95)
    loss, num_envs = RecurrentClipPPOLoss(agent), rollout.shape[0]
    options = {"num_envs": num_envs, "state_keys": loss.state_keys}
    for buffer in (
        RecurrentRolloutBuffer(rollout.numel(), 5, 3, burn_in=3, **options),
        RecurrentRolloutBuffer(rollout.numel(), 3, 4, state_stride=6, **options),
        EpisodeBuffer(rollout.numel(), STEPS, 2, **options),
    ):
        buffer.store(rollout.clone(), agent)
        for batch in buffer:
            with torch.no_grad():
                assert loss(batch)["ratio_error"] <= 1e-5


@pytest.mark.slow
def test_asynchronous_workers(make_env: Callable, make_agent: Callable, build_gru_case: Callable[..., Core]) -> None:
    agent = make_agent(build_gru_case(5))
    collector = MultiAsyncCollector(
        [partial(make_env, NUM_ENVS, seed) for seed in (1, 2)],
        agent,
        frames_per_batch=FRAMES,
        total_frames=4 * FRAMES,
        auto_register_policy_transforms=True,
    )
    try:
        for rollout in collector:
            assert rollout.shape == (NUM_ENVS, STEPS)
            check(agent, rollout.clone())
    finally:
        collector.shutdown()


def test_a_state_in_a_group_of_keys(make_env: Callable, build_gru_case: Callable[..., Core]) -> None:
    """Observation, features and state of one agent under its group's name, as multi-agent environments have it."""
    env = make_env(NUM_ENVS)
    env.append_transform(RenameTransform(["observation"], [("robot", "observation")]))
    spec = Composite(robot=Composite(observation=Unbounded((3,))))
    encoder = build_encoder(spec, batch_dims=0, features=5, observation_keys=[("robot", "observation")])
    backbone = Backbone(build_gru_case(5), state_key=("robot", "memory"))
    agent = PPOAgent(encoder, backbone, env.action_spec[0], policy_scale=2.0, value_scale=2.0)
    collector = Collector(
        env, agent, frames_per_batch=FRAMES, total_frames=2 * FRAMES, auto_register_policy_transforms=True
    )
    for rollout in collector:
        assert rollout["robot", "memory", "hidden"].std() > 0
        check(agent, rollout.clone())
    collector.shutdown()
