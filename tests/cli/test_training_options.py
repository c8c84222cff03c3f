"""Options of training: no critic, actions of the evaluation, micro batches."""

from __future__ import annotations

import pytest
import torch

from cyborg_torchrl.config import load_config
from cyborg_torchrl.envs import DelayedCueEnv
from cyborg_torchrl.training.builders import build_trainer
from cyborg_torchrl.training.experiment import run_experiment


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
