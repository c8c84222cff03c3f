"""A critic with a memory of its own: its values are those of a memory carried by hand, however they are collected."""

from __future__ import annotations

import itertools

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from tensordict.nn import TensorDictSequential as Sequence_
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import InitTracker, TransformedEnv
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.collectors import FusedCollector, RolloutCollector
from cyborg_torchrl.cores import build_gru, build_pmm
from cyborg_torchrl.data import RecurrentRolloutBuffer
from cyborg_torchrl.envs import DelayedCueEnv
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.modules.replay import acting_policy, memory_state_keys
from cyborg_torchrl.objectives import RecurrentClipPPOLoss, add_advantages

N, T, WIDTH = 6, 15, 16


def make_env(seed: int = 0) -> TransformedEnv:
    return TransformedEnv(DelayedCueEnv(num_envs=N, horizon=5, seed=seed), InitTracker())


def make_agent(env: TransformedEnv, build_core=build_gru) -> PPOAgent:
    torch.manual_seed(0)

    def part(features: str, memory: str, state: str):
        encoder = build_encoder(env.observation_spec, batch_dims=1, features=WIDTH, out_key=features)
        return encoder, Backbone(build_core(WIDTH, hidden_size=WIDTH), features, memory, state)

    critic = part(keys.CRITIC_FEATURES, keys.CRITIC_MEMORY_FEATURES, keys.CRITIC_STATE)
    actor = part(keys.FEATURES, keys.MEMORY_FEATURES, keys.MEMORY_STATE)
    hidden = {"policy_hidden_sizes": [8], "value_hidden_sizes": [8, 8]}
    return PPOAgent(*actor, env.action_spec, batch_dims=1, critic=critic, value_scale=1.0, policy_scale=1.0, **hidden)


def make_parts():
    """Actor and critic from TensorDictModules, as a user composes them."""
    torch.manual_seed(0)
    encode, judge = (TensorDictModule(nn.Linear(6, WIDTH), ["observation"], [key]) for key in ("a", "c"))
    act = Backbone(build_gru(WIDTH, hidden_size=WIDTH), "a", "a_out", "a_state")
    value = Backbone(build_gru(WIDTH, hidden_size=WIDTH), "c", "c_out", "c_state")
    sampler = ProbabilisticTensorDictModule(
        ["logits"], ["action"], distribution_class=torch.distributions.Categorical,
        return_log_prob=True, log_prob_key="action_log_prob",
    )  # fmt: skip
    logits = TensorDictModule(nn.Linear(WIDTH, 4), ["a_out"], ["logits"])
    actor = ProbabilisticTensorDictSequential(encode, act, logits, sampler)
    return actor, Sequence_(judge, value, TensorDictModule(nn.Linear(WIDTH, 1), ["c_out"], ["state_value"]))


@torch.no_grad()
def values_by_hand(critic: Sequence_, rollouts: list[TensorDictBase]) -> torch.Tensor:
    """Values along consecutive rollouts, with a memory that is carried from the first step on."""
    steps = torch.cat([rollout.select("observation", "is_init") for rollout in rollouts], 1)
    [backbone] = [module for module in critic.modules() if isinstance(module, Backbone)]
    state, values = backbone.core.initial_state(N), []
    for t in range(steps.shape[1]):
        step = steps[:, t].clone()
        for name, key in backbone.state_keys.items():
            step.set(key, state[name])
        step = critic(step)
        state = {name: step.get(("next", *key)) for name, key in backbone.state_keys.items()}
        values.append(step["state_value"])
    return torch.stack(values, 1)


def collect(kind: str, env, policy, critic, buffer, rollouts: int = 3):
    frames = {"frames_per_batch": N * T, "total_frames": rollouts * N * T}
    if kind == "rollout":
        return list(RolloutCollector(env, policy, value_operator=critic, state_steps=buffer.state_steps, **frames))
    if kind == "plain":
        options = {"value_operator": critic, "state_steps": buffer.state_steps, "is_fused": False}
        return list(RolloutCollector(env, policy, **options, **frames))
    kind_of = {"torchrl": Collector, "fused": FusedCollector}[kind]
    collector = kind_of(env, policy, auto_register_policy_transforms=True, **frames)
    return [rollout.clone() for rollout in collector]


@pytest.mark.parametrize("is_agent", [True, False], ids=["agent", "parts"])
@pytest.mark.parametrize("kind", ["rollout", "plain", "torchrl", "fused"])
@pytest.mark.parametrize(("seq_len", "burn_in", "stride"), [(7, 0, None), (5, 3, None), (2, 3, 6)])
def test_exact_in_every_collector_and_mode(kind, is_agent, seq_len, burn_in, stride):
    env = make_env()
    if is_agent:
        policy = make_agent(env)
        critic, loss = policy.get_value_operator(), RecurrentClipPPOLoss(policy)
    else:
        actor, critic = make_parts()
        loss = RecurrentClipPPOLoss(actor, critic)
        # RolloutCollector lets the critic act too; for other collectors the policy is both.
        policy = actor if kind in ("rollout", "plain") else acting_policy(actor, critic)
    buffer = RecurrentRolloutBuffer(
        N * T, seq_len, 5, num_envs=N, burn_in=burn_in, state_stride=stride, state_keys=loss.state_keys
    )
    rollouts = collect(kind, env, policy, critic, buffer)
    steps = [getattr(rollout, "steps", rollout) for rollout in rollouts]
    expected = values_by_hand(critic, steps)
    for rollout in rollouts:
        add_advantages(rollout, critic, gamma=0.99, gae_lambda=0.95)
    values = torch.cat([each["state_value"] for each in steps], 1)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    with loss.policy() as both:
        buffer.store(rollouts[-1], both)
    seen = 0
    for batch in buffer:
        losses = loss(batch)
        assert losses["ratio_error"] <= 1e-5
        with torch.no_grad():
            trained = loss.after_burn_in(batch)
            from torchrl.modules import set_recurrent_mode

            with set_recurrent_mode(True):
                again = critic(trained.clone()).get("state_value")
        mask = trained.get(("collector", "mask"), torch.ones_like(again, dtype=torch.bool)).reshape(again.shape)
        torch.testing.assert_close(again[mask], trained["state_value"][mask], rtol=0, atol=1e-5)
        seen += int(mask.sum())
        (losses["loss_objective"] + losses["loss_critic"]).backward()
    assert seen == N * T
    memories = [module for module in itertools.chain(critic.modules()) if isinstance(module, Backbone)]
    assert all(float(p.grad.abs().sum()) > 0 for p in memories[0].core.parameters() if p.ndim == 2)


def test_a_rollout_without_the_critics_memory_is_refused():
    env = make_env()
    actor, critic = make_parts()
    collector = Collector(
        env, actor, frames_per_batch=N * T, total_frames=2 * N * T, auto_register_policy_transforms=True
    )
    for rollout in collector:
        with pytest.raises(ValueError, match=r"c_state.*RolloutCollector"):
            add_advantages(rollout, critic, gamma=0.99, gae_lambda=0.95)


def test_evaluate_actions_uses_both_memories():
    env = make_env()
    agent = make_agent(env)
    buffer = RecurrentRolloutBuffer(N * T, T, N, num_envs=N, state_keys=memory_state_keys(agent))
    _, second = collect("rollout", env, agent, agent.get_value_operator(), buffer, rollouts=2)
    steps = second.steps
    state = {
        "hidden": second.stored_states[:, 0].get(("memory_state", "hidden")),
        "critic_hidden": second.stored_states[:, 0].get(("critic_state", "hidden")),
    }
    result = agent.evaluate_actions(steps["observation"], steps["action"], state, steps["is_init"])
    torch.testing.assert_close(result.log_prob, steps["action_log_prob"], rtol=0, atol=1e-5)
    torch.testing.assert_close(result.value.unsqueeze(-1), steps["state_value"], rtol=0, atol=1e-5)
    assert set(result.state) == {"hidden", "critic_hidden"}
    # another state of the critic changes values alone
    other = agent.evaluate_actions(
        steps["observation"], steps["action"], state | {"critic_hidden": state["critic_hidden"] + 1.0}, steps["is_init"]
    )
    torch.testing.assert_close(other.log_prob, result.log_prob)
    assert (other.value - result.value).abs().max() > 1e-3


def test_steps_by_hand_carry_both_memories():
    env = make_env()
    agent = make_agent(env)
    seen, state, values = torch.randn(N, T, 6), None, []
    for t in range(T):
        _, value, state = agent.act(seen[:, t], state)
        values.append(value)
    assert set(state) == {"hidden", "critic_hidden"}
    whole = agent.evaluate_actions(seen, torch.zeros(N, T, dtype=torch.long))
    torch.testing.assert_close(torch.stack(values, 1), whole.value, rtol=0, atol=1e-5)


def build_memory(in_features: int, hidden_size: int):
    return build_pmm(in_features, hidden_size=hidden_size, slots=4, prediction_coef=0.3)


@pytest.mark.parametrize("functional", [False, True])
def test_the_loss_of_the_critics_core_is_added(functional: bool):
    """Also with padded rows: it is the core's own loss over the critic's trained steps, and only the critic learns."""
    env = make_env()
    agent = make_agent(env, build_memory)
    loss = RecurrentClipPPOLoss(agent, functional=functional, separate_losses=False)
    buffer = RecurrentRolloutBuffer(N * T, 7, 18, num_envs=N, state_keys=loss.state_keys)
    [rollout] = collect("rollout", env, agent, agent.get_value_operator(), buffer, rollouts=1)
    add_advantages(rollout, agent.get_value_operator(), gamma=0.99, gae_lambda=0.95)
    buffer.store(rollout)
    [batch] = buffer
    mask = batch.get(keys.TRAIN_MASK).reshape(-1)
    assert not mask.all()
    losses = loss(batch.clone())
    encoder, backbone = agent.memories[1]
    work = batch.clone()
    with set_recurrent_mode(True):
        backbone(encoder(work))
    terms = {name: value.reshape(-1)[mask] for name, value in work.get(keys.MEMORY_METRICS).items()}
    for name, expected in backbone.core.regularize(terms).items():
        torch.testing.assert_close(losses[f"loss_critic_memory_{name}"], expected)
        assert (losses[f"loss_critic_memory_{name}"] - losses[f"loss_memory_{name}"]).abs() > 1e-6
    for name, values in terms.items():
        torch.testing.assert_close(losses[f"critic_memory_{name}"], values.detach().mean())
    assert not loss.is_mean_over_steps
    losses["loss_critic_memory_prediction"].backward()
    gradients = {name: p.grad for name, p in loss.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert gradients
    assert all("critic" in name for name in gradients)


def test_separate_losses_are_refused_where_they_lose_one():
    with pytest.raises(ValueError, match="separate_losses would lose the regulariser of the critic's memory"):
        RecurrentClipPPOLoss(make_agent(make_env(), build_memory), separate_losses=True)
