"""Options of training: no critic, optimisers and their learning rates, actions of the evaluation, micro batches."""

from __future__ import annotations

import pytest
import torch

from cyborg_torchrl.config import ConfigError, TrainConfig, load_config
from cyborg_torchrl.envs import DelayedCueEnv
from cyborg_torchrl.training.builders import build_trainer
from cyborg_torchrl.training.experiment import run_experiment
from cyborg_torchrl.training.optimizer import build_optimizer, learning_rate
from cyborg_torchrl.training.resume import with_config_of_run


def test_without_a_critic_an_advantage_is_the_return_minus_the_mean_of_its_step(tmp_path) -> None:
    overrides = ["env=n_back", "env.num_envs=8", "env.horizon=6", "logger=quiet", f"logger.base_dir={tmp_path}"]
    overrides += ["train.vf_coef=0", "train.gamma=0.9", "train.gae_lambda=1", "train.normalize_advantage=step"]
    trainer, _, _ = build_trainer(load_config(overrides=[*overrides, "train.total_timesteps=1"]))
    rollout = trainer.collector.rollout()
    trainer._prepare(rollout)
    steps = rollout.steps
    assert not steps["state_value"].any()
    reward = steps["next", "reward"].squeeze(-1)
    returns = torch.zeros_like(reward)
    for t in reversed(range(reward.shape[1])):  # one episode each
        returns[:, t] = reward[:, t] + (0.9 * returns[:, t + 1] if t + 1 < reward.shape[1] else 0.0)
    above_mean = returns - returns.mean(0)
    torch.testing.assert_close(steps["advantage"].squeeze(-1), above_mean / above_mean.std())
    trainer.update(rollout)
    assert not trainer.collector.rollout().steps["state_value"].any(), "the critic is not trained"


@pytest.mark.parametrize(("actions", "num_kinds"), [("greedy", 1), ("sampled", 4)])
def test_evaluation_takes_greedy_or_sampled_actions(actions, num_kinds, tmp_path, monkeypatch) -> None:
    """The query is always the same, so an agent without memory has one greedy answer, and several sampled ones."""
    taken = set()
    judge = DelayedCueEnv._judge

    def recording_judge(env, action, time, latents):
        if env.num_envs == 250:  # only in the evaluation
            taken.update(action[time == env.horizon + 1].tolist())
        return judge(env, action, time, latents)

    monkeypatch.setattr(DelayedCueEnv, "_judge", recording_judge)
    overrides = ["env.horizon=2", "train=none", "train.total_timesteps=1", "train.n_epochs=1", "logger=quiet"]
    overrides += [f"logger.base_dir={tmp_path}", "logger.eval_episodes=250", f"logger.eval_actions={actions}"]
    assert run_experiment(load_config(overrides=overrides))["eval_actions"] == actions
    assert len(taken) == num_kinds


@pytest.mark.parametrize("mode", ["episode", "tbptt", "none"])
def test_micro_batches_train_as_the_minibatch_would(mode, tmp_path) -> None:
    """Compare parameters and metrics after six minibatches, two of them smaller. The rows of n_back have masks."""
    overrides = ["env=n_back", "env.num_envs=7", "env.horizon=6", "logger=quiet", f"logger.base_dir={tmp_path}"]
    overrides += [f"train={mode}", "train.num_minibatches=3", "train.n_epochs=2", "train.total_timesteps=1"]
    overrides += ["train.seq_len=5"] if mode == "tbptt" else []
    results = []
    for limit in ("null", "11"):
        trainer, agent, _ = build_trainer(load_config(overrides=[*overrides, f"train.micro_batch_steps={limit}"]))
        passes = []
        trainer.loss.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        metrics = trainer.update(trainer.collector.rollout())
        results.append((agent.state_dict(), metrics, len(passes)))
    (whole, metrics, num_passes), (parts, metrics_of_parts, num_passes_of_parts) = results
    assert num_passes_of_parts >= 2 * num_passes
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-6)
    for key, value in metrics.items():
        assert metrics_of_parts[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize(
    ("name", "expected"),
    [("constant", [1, 1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25, 0]), ("cosine", [1, 0.853553, 0.5, 0.146447, 0])],
)
def test_learning_rates(name: str, expected: list[float]) -> None:
    config = TrainConfig(lr_schedule=name, learning_rate=2.0)
    rates = [learning_rate(config, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([2.0 * factor for factor in expected], abs=1e-5)
    assert learning_rate(config, 1.5) == rates[-1], "a resumed run may be longer"


def test_a_run_uses_its_schedule() -> None:
    overrides = ["env.horizon=2", "env.num_envs=8", "train.total_timesteps=128", "train.n_epochs=1"]
    overrides += ["train.n_steps=4", "train.lr_schedule=cosine", "train.learning_rate=1e-3"]
    trainer = build_trainer(load_config(overrides=overrides)).trainer
    rates = [metrics["learning_rate"] for metrics in trainer.run()]
    assert rates == pytest.approx([1e-3, 0.853553e-3, 0.5e-3, 0.146447e-3], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "kind", "step"),
    [
        ("adam", torch.optim.Adam, 1.0 - 0.1),
        ("adamw", torch.optim.AdamW, 1.0 * (1 - 0.1 * 0.5) - 0.1),
        ("rmsprop", torch.optim.RMSprop, 1.0 - 0.1 / 0.1),  # the root of 0.01 g^2, the first running mean
    ],
)
def test_optimizers(name: str, kind: type, step: float) -> None:
    """One step on a gradient of 1, computed by hand."""
    parameter = torch.nn.Parameter(torch.ones(1))
    config = TrainConfig(optimizer=name, learning_rate=0.1, weight_decay=0.5 if name == "adamw" else 0.0, adam_eps=1e-8)
    optimizer = build_optimizer(config, [parameter])
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert type(optimizer) is kind
    assert parameter.item() == pytest.approx(step, abs=1e-5)


def test_the_optimizer_of_a_run_is_resumed_and_cannot_change(tmp_path) -> None:
    overrides = ["env.horizon=2", "env.num_envs=8", "train.n_steps=4", "train.total_timesteps=32", "train.n_epochs=1"]
    overrides += ["train.optimizer=adamw", "train.weight_decay=0.1", "logger=quiet", "logger.eval_episodes=0"]
    run_experiment(load_config(overrides=[*overrides, f"logger.base_dir={tmp_path}", "logger.run_name=r"]))
    longer = [f"resume={tmp_path / 'r'}", "train.total_timesteps=64"]
    summary = run_experiment(with_config_of_run(load_config(overrides=longer), longer))
    assert summary["total_updates"] == 2
    other = [*longer, "train.optimizer=rmsprop", "train.weight_decay=0"]
    cfg = load_config(overrides=other)
    with pytest.raises(ConfigError, match=r"cannot change train\.optimizer"):
        with_config_of_run(cfg, other)


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_weight_decay_belongs_to_adamw(name: str) -> None:
    with pytest.raises(ConfigError, match=f"train.weight_decay belongs to optimizer=adamw; the optimizer is '{name}'"):
        load_config(overrides=[f"train.optimizer={name}", "train.weight_decay=0.1"])


def test_a_resumed_run_takes_the_optimizers_options_from_its_configuration(tmp_path) -> None:
    overrides = ["env.horizon=2", "env.num_envs=8", "train.n_steps=4", "train.total_timesteps=32", "logger=quiet"]
    overrides += [f"logger.base_dir={tmp_path}"]
    first = build_trainer(load_config(overrides=overrides)).trainer
    first.update(first.collector.rollout())
    second = build_trainer(load_config(overrides=[*overrides, "train.adam_eps=0.25"])).trainer
    second.load_state_dict(first.state_dict())
    assert second.optimizer.param_groups[0]["eps"] == 0.25
    before, after = (each.optimizer.state_dict()["state"] for each in (first, second))
    assert before
    assert all(torch.equal(before[i]["exp_avg"], after[i]["exp_avg"]) for i in before)
