"""Before the first update, what the update computes is what the rollout saw: in every mode, chunking and collector."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from tensordict import TensorDictBase
from torchrl.collectors import Collector, MultiSyncCollector

from cyborg_torchrl.config import TrainConfig
from cyborg_torchrl.cores import Core, MemorylessCore
from cyborg_torchrl.data import RecurrentRolloutBuffer, RolloutBuffer
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.objectives import RecurrentClipPPOLoss, add_advantages
from cyborg_torchrl.training.trainer import PPOTrainer

NUM_ENVS, STEPS = 4, 18
SEQ_LENS = {"whole": STEPS, "divisor": 6, "one": 1}
TOLERANCE = 1e-5


def largest_errors(agent: PPOAgent, batch: TensorDictBase) -> tuple[float, float]:
    """Largest |log ratio| and value difference of a batch of sequences, by `evaluate_actions`."""
    state = {name: batch.get(key)[:, 0] for name, key in agent.backbone.state_keys.items()}
    with torch.no_grad():
        evaluation = agent.evaluate_actions(batch["observation"], batch["action"], state, batch["is_init"])
    log_ratio = evaluation.log_prob - batch["action_log_prob"]
    return log_ratio.abs().max().item(), (evaluation.value - batch["state_value"].squeeze(-1)).abs().max().item()


def check_honesty(agent: PPOAgent, rollout: TensorDictBase, seq_len: int) -> None:
    add_advantages(rollout, agent.get_value_operator(), gamma=0.99, gae_lambda=0.95)
    buffer = RecurrentRolloutBuffer(rollout.numel(), seq_len, batch_size=rollout.numel() // seq_len // 3 + 1)
    buffer.store(rollout)
    loss = RecurrentClipPPOLoss(agent)
    steps = 0
    for batch in buffer:
        assert batch.shape[1:] == (seq_len,)
        log_ratio, value_error = largest_errors(agent, batch)
        assert log_ratio <= TOLERANCE
        assert value_error <= TOLERANCE
        with torch.no_grad():
            losses = loss(batch)
        assert losses["ratio_error"] <= TOLERANCE
        assert (losses["max_ratio"] - 1).abs() <= 2 * TOLERANCE
        steps += batch.numel()
    assert steps == rollout.numel()


def check_there_is_something_to_see(rollout: TensorDictBase) -> None:
    """Resets inside the rollout, by termination and by truncation, and states that are not all alike."""
    inside = rollout[:, :-1]["next"]
    assert inside["terminated"].any()
    assert (inside["truncated"] & ~inside["terminated"]).any()
    assert torch.equal(inside["done"], rollout[:, 1:]["is_init"])
    for state in rollout["memory_state"].values():
        assert (state[rollout["is_init"].squeeze(-1)] == 0).all(), "TorchRL primes the stored state with zeros"
        assert state.std() > 0


@pytest.fixture
def rollout_of(make_env: Callable, collect: Callable) -> Callable[[str, PPOAgent], TensorDictBase]:
    """Collects one rollout [N, T] that does not begin where the environments do."""

    def run(kind: str, agent: PPOAgent) -> TensorDictBase:
        if kind == "by_hand":
            return collect(agent, make_env(NUM_ENVS), STEPS + 5)[:, 5:].contiguous()
        frames = NUM_ENVS * STEPS
        collector = Collector(
            make_env(NUM_ENVS),
            agent,
            frames_per_batch=frames,
            total_frames=2 * frames,
            auto_register_policy_transforms=True,
        )
        rollouts = [rollout.clone() for rollout in collector]
        collector.shutdown()
        return rollouts[1]

    return run


@pytest.mark.parametrize("kind", ["collector", "by_hand"])
def test_the_update_sees_what_the_rollout_saw(
    build_core: Callable[..., Core], make_agent: Callable, rollout_of: Callable, kind: str
) -> None:
    agent = make_agent(build_core(5))
    rollout = rollout_of(kind, agent)
    assert rollout.shape == (NUM_ENVS, STEPS)
    check_there_is_something_to_see(rollout)
    assert not rollout["is_init"][:, 0].all(), "some rows must begin in the middle of an episode"
    for seq_len in SEQ_LENS.values():
        check_honesty(agent, rollout, seq_len)


def test_without_memory_single_steps_are_enough(
    build_core: Callable[..., Core], make_agent: Callable, rollout_of: Callable
) -> None:
    agent = make_agent(MemorylessCore(build_core(5)))
    rollout = rollout_of("collector", agent)
    assert "memory_state" not in rollout.keys()
    assert "memory_state" not in rollout["next"].keys()
    add_advantages(rollout, agent.get_value_operator(), gamma=0.99, gae_lambda=0.95)
    buffer = RolloutBuffer(rollout.numel(), batch_size=29)
    buffer.store(rollout)
    loss = RecurrentClipPPOLoss(agent)
    for batch in buffer:
        with torch.no_grad():
            losses = loss(batch)
            evaluation = agent.evaluate_actions(batch["observation"].unsqueeze(1), batch["action"].unsqueeze(1))
        assert losses["ratio_error"] <= TOLERANCE
        assert (evaluation.log_prob.squeeze(1) - batch["action_log_prob"]).abs().max() <= TOLERANCE
        value = batch["state_value"]  # of any size: rounded relative to it
        assert ((evaluation.value - value) / value.abs().clamp_min(1.0)).abs().max() <= TOLERANCE


def test_states_are_those_of_each_environment_alone(
    build_core: Callable[..., Core], make_agent: Callable, rollout_of: Callable
) -> None:
    """Recomputes every next state with a loop of single steps over each environment."""
    core = build_core(5)
    agent = make_agent(core)
    rollout = rollout_of("collector", agent)
    with torch.no_grad():
        features = agent.encoder.module(rollout["observation"])
        for row in (0, NUM_ENVS - 1):
            state = {name: value[row : row + 1, 0] for name, value in rollout["memory_state"].items()}
            for t in range(STEPS):
                if rollout["is_init"][row, t]:
                    state = core.initial_state(1)
                _, state = core.step(features[row : row + 1, t], state)
                for name, value in state.items():
                    recorded = rollout["next", "memory_state", name][row, t]
                    torch.testing.assert_close(recorded, value[0], rtol=1e-5, atol=1e-5)


def test_the_check_can_fail(build_core: Callable[..., Core], make_agent: Callable, rollout_of: Callable) -> None:
    agent = make_agent(build_core(5))
    rollout = rollout_of("by_hand", agent)
    rollout["memory_state"].zero_()
    buffer = RecurrentRolloutBuffer(rollout.numel(), 6, batch_size=NUM_ENVS * STEPS // 6)
    buffer.store(add_advantages(rollout, agent.get_value_operator(), gamma=0.99, gae_lambda=0.95))
    batch = buffer.sample()
    with torch.no_grad():
        assert RecurrentClipPPOLoss(agent)(batch)["ratio_error"] > 1e-3
    assert min(largest_errors(agent, batch)) > 1e-3


def test_an_update_shows_in_the_ratio(
    build_core: Callable[..., Core], make_agent: Callable, rollout_of: Callable
) -> None:
    agent = make_agent(build_core(5))
    rollout = rollout_of("by_hand", agent)
    add_advantages(rollout, agent.get_value_operator(), gamma=0.99, gae_lambda=0.95)
    before = copy.deepcopy(agent.state_dict())
    buffer = RecurrentRolloutBuffer(rollout.numel(), 6, batch_size=8)
    buffer.store(rollout)
    loss = RecurrentClipPPOLoss(agent, normalize_advantage=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    errors = []
    for batch in buffer:
        losses = loss(batch)
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
        optimizer.step()
        errors.append(losses["ratio_error"].item())
    assert errors[0] <= TOLERANCE
    assert min(errors[1:]) > 1e-3
    unchanged = [name for name, value in agent.named_parameters() if torch.equal(value, before[name])]
    assert unchanged == []


@pytest.mark.slow
def test_worker_processes_act_with_the_parameters_of_the_last_update(
    make_env: Callable, make_agent: Callable, build_gru_case: Callable[..., Core]
) -> None:
    agent = make_agent(build_gru_case(5))
    frames, updates = NUM_ENVS * STEPS, 3
    collector = MultiSyncCollector(
        [partial(make_env, NUM_ENVS // 2, seed) for seed in (1, 2)],
        agent,
        frames_per_batch=frames,
        total_frames=updates * frames,
        cat_results=0,
        auto_register_policy_transforms=True,
    )
    config = TrainConfig(n_epochs=1, total_timesteps=updates * frames, learning_rate=1e-2)
    buffer = RecurrentRolloutBuffer(frames, 6, 4)
    trainer = PPOTrainer(collector, RecurrentClipPPOLoss(agent), agent.get_value_operator(), buffer, config)
    try:
        for rollout in collector:
            assert rollout.shape == (NUM_ENVS, STEPS)
            check_there_is_something_to_see(rollout)
            for seq_len in SEQ_LENS.values():
                check_honesty(agent, rollout.clone(), seq_len)
            assert trainer.update(rollout)["ratio_error"] <= TOLERANCE
            collector.update_policy_weights_()
    finally:
        collector.shutdown()
    assert trainer.num_updates == updates
