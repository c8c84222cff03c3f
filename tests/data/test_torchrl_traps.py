"""Where TorchRL alone is silently wrong about memory: its way is shown failing, and ours beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SliceSampler, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs.transforms import BurnInTransform
from torchrl.modules import set_recurrent_mode
from torchrl.objectives.value import GAE

from cyborg_torchrl.cores import Core
from cyborg_torchrl.data import RecurrentRolloutBuffer
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.objectives import RecurrentClipPPOLoss, add_advantages

NUM_ENVS, STEPS, BURN_IN, SEQ_LEN = 4, 40, 4, 8
FRAMES = NUM_ENVS * STEPS
WRONG, RIGHT = 1e-2, 1e-6


@pytest.fixture
def agent(build_gru_case: Callable[..., Core], make_agent: Callable) -> PPOAgent:
    return make_agent(build_gru_case(5))


def rollout_of(policy, critic, env) -> TensorDictBase:
    collector = Collector(
        env, policy, frames_per_batch=FRAMES, total_frames=FRAMES, auto_register_policy_transforms=True
    )
    rollout = next(iter(collector)).clone()
    collector.shutdown()
    return add_advantages(rollout, critic, gamma=0.99, gae_lambda=0.95)


def ratio_error(policy, batch: TensorDictBase) -> float:
    """Largest |log ratio| of sequences [B, T] before any update, whatever the loss is."""
    with torch.no_grad(), set_recurrent_mode(True):
        log_prob = policy.get_dist(batch.clone()).log_prob(batch["action"])
    return float((log_prob - batch["action_log_prob"]).abs().max())


def test_an_episode_that_begins_where_burn_in_ends(their_policy: Callable, make_env: Callable) -> None:
    """BurnInTransform hands the state of the episode before to the one that begins at the edge."""
    policy = their_policy("gru")
    rollout = rollout_of(policy.actor, policy.critic, make_env(NUM_ENVS, p_terminated=0.2))
    starts = range(0, STEPS - SEQ_LEN - BURN_IN, BURN_IN)
    windows = torch.cat([rollout[:, t : t + BURN_IN + SEQ_LEN] for t in starts])
    at_the_edge = windows["is_init"][:, BURN_IN, 0]
    assert at_the_edge.any()
    burn_in = BurnInTransform([policy.actor.module[0]], BURN_IN, out_keys=["recurrent_state"])
    with set_recurrent_mode(True):
        theirs = burn_in(windows.clone())
    assert ratio_error(policy.actor, theirs[~at_the_edge]) <= RIGHT
    assert ratio_error(policy.actor, theirs[at_the_edge]) > WRONG

    buffer = RecurrentRolloutBuffer(FRAMES, SEQ_LEN, 7, burn_in=BURN_IN, state_keys=policy.state_keys)
    buffer.store(rollout)
    loss, seen = RecurrentClipPPOLoss(policy.actor, policy.head), 0
    for batch in buffer:
        cut = loss.after_burn_in(batch)
        seen += int((cut["is_init"][:, 0] & (batch["collector", "burn_in"].any(1))).sum())
        assert ratio_error(policy.actor, cut) <= RIGHT
    assert seen, "an episode must begin where burn-in ends"


def slices(rollout: TensorDictBase, buffer_class: type, **options) -> TensorDictBase:
    """SliceSampler's batch: slices laid end to end, [B T]."""
    rollout = rollout.clone()
    rollout["collector", "traj_ids"] = rollout["is_init"].squeeze(-1).flatten().cumsum(0).view(NUM_ENVS, STEPS)
    sampler = SliceSampler(slice_len=SEQ_LEN, traj_key=("collector", "traj_ids"), strict_length=True, **options)
    buffer = buffer_class(
        storage=LazyTensorStorage(FRAMES, ndim=2), sampler=sampler, batch_size=SEQ_LEN * 24
    )  # fmt: skip
    buffer.extend(rollout)
    return buffer.sample()


def test_slices_leak_into_each_other(their_policy: Callable, make_env: Callable) -> None:
    """A plain ReplayBuffer does not mark where slices begin: memory runs on from one into the next."""
    policy = their_policy("gru")
    rollout = rollout_of(policy.actor, policy.critic, make_env(NUM_ENVS, p_terminated=0.02, p_truncated=0.02))
    batch = slices(rollout, ReplayBuffer)
    assert ratio_error(policy.actor, batch.unsqueeze(0)) > WRONG
    sequences = batch.reshape(-1, SEQ_LEN)
    assert ratio_error(policy.actor, sequences) <= RIGHT
    with torch.no_grad():
        assert RecurrentClipPPOLoss(policy.actor, policy.head)(sequences)["ratio_error"] <= RIGHT


def test_flat_slices_are_refused_with_the_cure(agent: PPOAgent, make_env: Callable) -> None:
    rollout = rollout_of(agent, agent.get_value_operator(), make_env(NUM_ENVS, p_terminated=0.02, p_truncated=0.02))
    batch = slices(rollout, ReplayBuffer)
    loss = RecurrentClipPPOLoss(agent)
    with pytest.raises(ValueError, match=r"got a batch \[192\].*batch.reshape\(-1, slice_len\)"):
        loss(batch)
    with torch.no_grad():
        assert loss(batch.reshape(-1, SEQ_LEN))["ratio_error"] <= RIGHT


def test_marked_slices_restart_memory_and_are_named(agent: PPOAgent, make_env: Callable) -> None:
    """TensorDictReplayBuffer marks slices with is_init, for modules that read the stored state there. Ours does not."""
    rollout = rollout_of(agent, agent.get_value_operator(), make_env(NUM_ENVS, p_terminated=0.02, p_truncated=0.02))
    marked = slices(rollout, TensorDictReplayBuffer).reshape(-1, SEQ_LEN)
    assert ratio_error(agent, marked) > WRONG
    with torch.no_grad(), pytest.warns(UserWarning, match="init_key=None"):
        RecurrentClipPPOLoss(agent)(marked)
    unmarked = slices(rollout, TensorDictReplayBuffer, init_key=None).reshape(-1, SEQ_LEN)
    with torch.no_grad():
        assert RecurrentClipPPOLoss(agent)(unmarked)["ratio_error"] <= RIGHT


def test_shuffled_steps_are_refused(agent: PPOAgent, make_env: Callable) -> None:
    """SamplerWithoutReplacement over a two-dimensional storage shuffles steps, and says nothing."""
    rollout = rollout_of(agent, agent.get_value_operator(), make_env(NUM_ENVS))
    storage = LazyTensorStorage(FRAMES, ndim=2)
    buffer = ReplayBuffer(storage=storage, sampler=SamplerWithoutReplacement(), batch_size=64)
    buffer.extend(rollout)
    batch = buffer.sample()
    assert batch.shape == (64,)
    with pytest.raises(ValueError, match="shuffled order have lost their past"):
        RecurrentClipPPOLoss(agent)(batch)


def test_chunk_rows_in_a_plain_buffer(agent: PPOAgent, make_env: Callable) -> None:
    """TorchRL's buffer and sampler do, where a row is a chunk."""
    rollout = rollout_of(agent, agent.get_value_operator(), make_env(NUM_ENVS))
    rows = rollout.reshape(-1, SEQ_LEN)
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(len(rows)), sampler=SamplerWithoutReplacement(), batch_size=len(rows)
    )
    buffer.extend(rows)
    with torch.no_grad():
        assert RecurrentClipPPOLoss(agent)(buffer.sample())["ratio_error"] <= RIGHT


@pytest.mark.parametrize("shifted", [False, True])
def test_gae_of_a_recurrent_critic(their_policy: Callable, make_env: Callable, shifted: bool) -> None:
    """TorchRL's GAE is not run in recurrent mode, and shifted values skip what follows a truncation."""
    policy = their_policy("gru")
    rollout = rollout_of(policy.actor, policy.critic, make_env(NUM_ENVS, p_terminated=0.1, p_truncated=0.2))
    expected = advantages_by_hand(policy, rollout, gamma=0.9, gae_lambda=0.8)
    ours = add_advantages(rollout.clone(), policy.critic, gamma=0.9, gae_lambda=0.8)["advantage"]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    gae = GAE(gamma=0.9, lmbda=0.8, value_network=policy.critic, shifted=shifted, deactivate_vmap=True)
    with torch.no_grad():
        theirs = gae(rollout.exclude("advantage", "value_target", "state_value").clone())["advantage"]
    assert (theirs - expected).abs().max() > WRONG


@torch.no_grad()
def advantages_by_hand(policy, rollout: TensorDictBase, gamma: float, gae_lambda: float) -> Tensor:
    """One environment and one step after the other, values from the state that had been reached."""
    advantage = torch.zeros(NUM_ENVS, STEPS, 1)
    for env in range(NUM_ENVS):
        running = 0.0
        for t in reversed(range(STEPS)):
            step = rollout[env, t]
            value = policy.critic(step.clone())["state_value"]
            following = step["next"].clone()
            following["is_init"] = torch.zeros(1, dtype=torch.bool)
            value_after = policy.critic(following)["state_value"] * ~step["next", "terminated"]
            delta = step["next", "reward"] + gamma * value_after - value
            running = delta + gamma * gae_lambda * running * ~step["next", "done"]
            advantage[env, t] = running
    return advantage
