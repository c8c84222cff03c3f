"""The recurrent PPO loss: against TorchRL's, against the formula, and with policies that know nothing of us."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.collectors import Collector
from torchrl.objectives import ClipPPOLoss

from cyborg_torchrl.config import TrainConfig
from cyborg_torchrl.cores import Core
from cyborg_torchrl.data import RecurrentRolloutBuffer
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.objectives import RecurrentClipPPOLoss, add_advantages
from cyborg_torchrl.training.trainer import PPOTrainer

NUM_ENVS, STEPS, SEQ_LEN = 4, 18, 6
LOSSES = ("loss_objective", "loss_critic", "loss_entropy")


@pytest.fixture
def agent(build_gru_case: Callable[..., Core], make_agent: Callable) -> PPOAgent:
    return make_agent(build_gru_case(5))


@pytest.fixture
def batch(agent: PPOAgent, make_env: Callable, collect: Callable) -> TensorDictBase:
    """All chunks of one rollout, with log-probs and values moved a little, as after an update."""
    rollout = collect(agent, make_env(NUM_ENVS), STEPS + 5)[:, 5:].contiguous()
    add_advantages(rollout, agent.get_value_operator(), gamma=0.99, gae_lambda=0.95)
    rows = NUM_ENVS * STEPS // SEQ_LEN
    buffer = RecurrentRolloutBuffer(rollout.numel(), SEQ_LEN, rows)
    buffer.store(rollout)
    sequences = buffer.sample()
    sequences["action_log_prob"] += 0.3 * torch.randn(rows, SEQ_LEN)
    sequences["state_value"] += 0.3 * torch.randn(rows, SEQ_LEN, 1)
    return sequences


def backward(loss: nn.Module, batch: TensorDictBase) -> tuple[TensorDictBase, dict[str, torch.Tensor]]:
    """Losses, and the gradient of their sum for each parameter of the loss, by shape and size."""
    losses = loss(batch.clone())
    parameters = dict(loss.named_parameters())
    total = sum(losses[name] for name in LOSSES if name in losses.keys())
    grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return losses, dict(zip(parameters, grads, strict=True))


OPTIONS = [
    {},
    {"normalize_advantage": True},
    {"clip_value": 0.1, "clip_epsilon": 0.1},
    {"entropy_coeff": 0.5, "critic_coeff": 2.0, "loss_critic_type": "l2"},
    {"entropy_bonus": False, "normalize_advantage": True},
    {"clip_epsilon": (0.1, 0.4)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("functional", [False, True])
def test_equals_torchrls_loss(agent: PPOAgent, batch: TensorDictBase, functional: bool, options: dict) -> None:
    ours, our_grads = backward(RecurrentClipPPOLoss(agent, functional=functional, **options), batch)
    actor, critic = agent.get_policy_operator(), agent.get_value_head()
    theirs, their_grads = backward(ClipPPOLoss(actor, critic, functional=functional, **options), batch)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    assert set(ours.keys()) == {*theirs.keys(), "ratio_error", "kl"}
    size = sum(grad.square().sum() for grad in their_grads.values() if grad is not None)
    assert size > 0
    our_size = sum(grad.square().sum() for grad in our_grads.values() if grad is not None)
    torch.testing.assert_close(our_size, size, rtol=1e-4, atol=0)


def test_functional_or_not_is_the_same(agent: PPOAgent, batch: TensorDictBase) -> None:
    plain, _ = backward(RecurrentClipPPOLoss(agent), batch)
    functional, _ = backward(RecurrentClipPPOLoss(agent, functional=True), batch)
    for name, value in plain.items():
        torch.testing.assert_close(functional[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formula(agent: PPOAgent, batch: TensorDictBase, masked: bool) -> None:
    """Written out from `evaluate_actions`, with advantages normalised over the trained steps alone."""
    mask = torch.rand(batch.shape) < 0.6 if masked else torch.ones(batch.shape, dtype=torch.bool)
    if masked:
        batch["collector", "mask"] = mask
    loss = RecurrentClipPPOLoss(
        agent, normalize_advantage=True, entropy_coeff=0.3, critic_coeff=0.7, loss_critic_type="l2"
    )
    losses = loss(batch)
    state = {name: value[:, 0] for name, value in batch["memory_state"].items()}
    new = agent.evaluate_actions(batch["observation"], batch["action"], state, batch["is_init"])
    log_ratio = (new.log_prob - batch["action_log_prob"])[mask]
    advantage = batch["advantage"].squeeze(-1)[mask]
    advantage = (advantage - advantage.mean()) / advantage.std()
    clipped = log_ratio.exp().clamp(0.8, 1.2)
    objective = torch.minimum(log_ratio.exp() * advantage, clipped * advantage).mean()
    error = (new.value - batch["value_target"].squeeze(-1))[mask]
    torch.testing.assert_close(losses["loss_objective"], -objective, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss_critic"], 0.7 * error.square().mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss_entropy"], -0.3 * new.entropy[mask].mean(), rtol=1e-4, atol=1e-6)
    log_ratio = log_ratio.detach()
    torch.testing.assert_close(losses["ratio_error"], log_ratio.abs().max(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["kl"], (log_ratio.exp() - 1.0 - log_ratio).mean(), rtol=1e-4, atol=1e-6)


def test_masked_steps_change_nothing(agent: PPOAgent, batch: TensorDictBase) -> None:
    mask = torch.ones(batch.shape, dtype=torch.bool)
    mask[:, :2] = False
    batch["collector", "mask"] = mask
    other = batch.clone()
    for key in ("advantage", "value_target", "state_value"):
        other[key] = torch.where(mask.unsqueeze(-1), other[key], 1e3)
    other["action_log_prob"] = torch.where(mask, other["action_log_prob"], -3.0)
    loss = RecurrentClipPPOLoss(agent, normalize_advantage=True)
    (losses, grads), (same, same_grads) = backward(loss, batch), backward(loss, other)
    for name in (*LOSSES, "ratio_error"):
        torch.testing.assert_close(same[name], losses[name])
    for name, grad in grads.items():
        torch.testing.assert_close(same_grads[name], grad)


def test_the_loss_of_the_last_step_reaches_the_first_observation(agent: PPOAgent, batch: TensorDictBase) -> None:
    batch["is_init"][:] = False
    mask = torch.zeros(batch.shape, dtype=torch.bool)
    mask[:, -1] = True
    batch["collector", "mask"] = mask
    batch["observation"].requires_grad_()
    losses = RecurrentClipPPOLoss(agent)(batch)
    (grad,) = torch.autograd.grad(losses["loss_objective"] + losses["loss_critic"], batch["observation"])
    assert (grad[:, 0].abs().sum(-1) > 0).all()


def test_the_loss_leaves_the_batch_alone(agent: PPOAgent, batch: TensorDictBase) -> None:
    kept = batch.clone()
    RecurrentClipPPOLoss(agent, normalize_advantage=True)(batch)
    assert set(batch.keys(True, True)) == set(kept.keys(True, True))
    assert (batch == kept).all()


def test_unreduced_losses(agent: PPOAgent, batch: TensorDictBase) -> None:
    losses = RecurrentClipPPOLoss(agent, reduction="none")(batch)
    assert losses["loss_objective"].shape == batch.shape
    assert losses["ratio_error"].shape == ()


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("head_only", [True, False], ids=["head", "operator"])
def test_torchrls_own_loss_trains_our_agent(
    agent: PPOAgent, batch: TensorDictBase, functional: bool, head_only: bool
) -> None:
    critic = agent.get_value_head() if head_only else agent.get_value_operator()
    loss = ClipPPOLoss(agent.get_policy_operator(), critic, functional=functional, entropy_coeff=0.1)
    before = copy.deepcopy(agent.state_dict())
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    objectives = []
    for _ in range(5):
        losses = loss(batch.clone())
        total = sum(losses[name] for name in LOSSES)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        objectives.append(total.item())
    assert objectives[-1] < objectives[0]
    unchanged = [name for name, value in agent.state_dict().items() if torch.equal(value, before[name])]
    assert unchanged == []


def test_every_parameter_of_the_agent_is_trained(build_core: Callable[..., Core], make_agent: Callable) -> None:
    agent = make_agent(build_core(5))
    names = {id(p) for p in RecurrentClipPPOLoss(agent).parameters()}
    assert names == {id(p) for p in agent.parameters()}


# policies that are TorchRL's through and through


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_trains_a_policy_that_is_torchrls_own(kind: str, make_env: Callable, their_policy: Callable) -> None:
    policy = their_policy(kind)
    frames = NUM_ENVS * STEPS
    collector = Collector(
        make_env(NUM_ENVS),
        policy.actor,
        frames_per_batch=frames,
        total_frames=3 * frames,
        auto_register_policy_transforms=True,
    )
    trainer = PPOTrainer(
        collector,
        RecurrentClipPPOLoss(policy.actor, policy.head),
        policy.critic,
        RecurrentRolloutBuffer(frames, SEQ_LEN, 5, state_keys=policy.state_keys),
        TrainConfig(n_epochs=2, total_timesteps=3 * frames),
    )
    before = copy.deepcopy(policy.state_dict())
    metrics = list(trainer.run())
    collector.shutdown()
    assert len(metrics) == 3
    for update in metrics:
        assert update["ratio_error"] <= 1e-5
        assert all(torch.tensor(value).isfinite() for value in update.values())
    unchanged = [name for name, value in policy.state_dict().items() if torch.equal(value, before[name])]
    assert unchanged == []


def test_values_are_those_of_the_present_critic(make_env: Callable, their_policy: Callable) -> None:
    """A collector may hand out the same tensordict again: values of an earlier rollout must not be taken for new."""
    policy = their_policy("gru")
    frames = NUM_ENVS * STEPS
    collector = Collector(
        make_env(NUM_ENVS),
        policy.actor,
        frames_per_batch=frames,
        total_frames=3 * frames,
        auto_register_policy_transforms=True,
    )
    for rollout in collector:
        fresh = rollout.exclude("state_value", "advantage", "value_target").clone()
        for td in (rollout, fresh):
            add_advantages(td, policy.critic, gamma=0.99, gae_lambda=0.95)
        torch.testing.assert_close(rollout["state_value"], fresh["state_value"])
    collector.shutdown()


def test_our_sequences_give_their_module_what_it_had(make_env: Callable, their_policy: Callable) -> None:
    """With resets inside the chunks, for which TorchRL's modules read the stored state."""
    policy = their_policy("lstm")
    frames = NUM_ENVS * STEPS
    options = {"frames_per_batch": frames, "total_frames": frames, "auto_register_policy_transforms": True}
    collector = Collector(make_env(NUM_ENVS), policy.actor, **options)
    rollout = next(iter(collector)).clone()
    collector.shutdown()
    assert rollout["is_init"][:, 1:].any()
    add_advantages(rollout, policy.critic, gamma=0.99, gae_lambda=0.95)
    for seq_len in (1, SEQ_LEN, STEPS):
        buffer = RecurrentRolloutBuffer(frames, seq_len, 4, state_keys=policy.state_keys)
        buffer.store(rollout)
        for batch in buffer:
            with torch.no_grad():
                assert RecurrentClipPPOLoss(policy.actor, policy.head)(batch)["ratio_error"] <= 1e-5


def test_keys_can_be_renamed(agent: PPOAgent, batch: TensorDictBase) -> None:
    expected, _ = backward(RecurrentClipPPOLoss(agent), batch)
    loss = RecurrentClipPPOLoss(agent)
    loss.set_keys(advantage="my_advantage", value_target=("my", "target"))
    renamed = batch.rename_key_("advantage", "my_advantage").rename_key_("value_target", ("my", "target"))
    losses, _ = backward(loss, renamed)
    for name in LOSSES:
        torch.testing.assert_close(losses[name], expected[name])


def test_a_missing_log_prob_is_named(agent: PPOAgent, batch: TensorDictBase) -> None:
    with pytest.raises(KeyError, match="action_log_prob"):
        RecurrentClipPPOLoss(agent)(TensorDict(dict(batch.exclude("action_log_prob").items()), batch.shape))
