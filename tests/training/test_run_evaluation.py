"""Evaluations between updates: they change nothing of training, choose best.pt, and can end a run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from cyborg_torchrl.config import load_config
from cyborg_torchrl.training import experiment
from cyborg_torchrl.training.checkpoint import load_checkpoint
from cyborg_torchrl.training.experiment import run_experiment
from cyborg_torchrl.training.loading import load_agent
from cyborg_torchrl.training.run_evaluation import evaluate_update
from cyborg_torchrl.training.trainer import PPOTrainer

TINY = ["logger.progress=false", "logger.tensorboard=false", "logger.eval_episodes=0", "train.n_epochs=2"]
CUE = ["env.horizon=2", "env.num_envs=16", "train.n_steps=4", "train.num_minibatches=2", "train.learning_rate=1e-2"]
CARTPOLE = ["env=gymnasium", "env.id=CartPole-v1", "env.num_envs=4", "train.n_steps=16", "train.num_minibatches=2"]
TIMES = (
    "seconds",
    "steps_per_second",
    "seconds_collect",
    "seconds_advantages",
    "seconds_update",
    "seconds_checkpoint",
)
EVALUATED = ["logger.eval_every=2", "logger.eval_every_episodes=24"]
STOPPED = [*CUE, *EVALUATED, "train.total_timesteps=6400", "train.stop_at=0.6"]


def config(folder: Path, name: str, *more: str) -> DictConfig:
    return load_config(overrides=[*TINY, *more, f"logger.base_dir={folder}", f"logger.run_name={name}"])


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "logs" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def evaluations(run: Path) -> dict[int, float]:
    """Return the evaluated success of each update that has one."""
    return {int(row["update"]): float(row["eval/success_rate"]) for row in rows_of(run) if row["eval/success_rate"]}


def training_metrics(run: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in TIMES and not k.startswith("eval/")} for row in rows_of(run)]


CASES = {
    "memory task": [*CUE, "train.total_timesteps=320"],
    "fused": [*CUE, "collector=fused", "train.total_timesteps=320"],
    "statistics": [
        *CARTPOLE, "train.total_timesteps=320", "transforms.normalize_observation=true",
        "transforms.normalize_reward=true", "transforms.frame_stack=2", "transforms.previous_action=true",
    ],
    "processes": [*CARTPOLE, "train.total_timesteps=320", "env.workers=2"],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_run_with_evaluations_trains_as_one_without(tmp_path: Path, case: str) -> None:
    sampled = "logger.eval_actions=sampled"  # draws from torch's generator
    run_experiment(config(tmp_path, "without", *CASES[case], sampled))
    run_experiment(config(tmp_path, "with", *CASES[case], sampled, *EVALUATED))
    assert len(training_metrics(tmp_path / "with")) == 5
    assert training_metrics(tmp_path / "with") == training_metrics(tmp_path / "without")
    last = [load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["agent"] for name in ("with", "without")]
    assert all(torch.equal(value, last[1][key]) for key, value in last[0].items())
    evaluated = [int(row["update"]) for row in rows_of(tmp_path / "with") if row["eval/mean_reward"]]
    assert evaluated == [2, 4, 5], "every second update, and the last"
    assert not any(row["eval/mean_reward"] for row in rows_of(tmp_path / "without"))


@pytest.mark.parametrize("case", ["memory task", "statistics"])
def test_a_resumed_run_has_the_evaluations_of_a_whole_one(tmp_path: Path, monkeypatch, case: str) -> None:
    options = [*CASES[case], *EVALUATED, "logger.eval_actions=sampled", "resume=auto"]
    run_experiment(config(tmp_path, "whole", *options))
    update = PPOTrainer.update

    def killed(trainer: PPOTrainer, rollout: Any) -> Any:
        if trainer.num_updates == 3:
            raise SystemExit
        return update(trainer, rollout)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "update", killed)
        with pytest.raises(SystemExit):
            run_experiment(config(tmp_path, "cut", *options))
    torch.manual_seed(99)
    run_experiment(config(tmp_path, "cut", *options))
    timed = (*TIMES, "eval/seconds")
    whole, cut = (
        [{k: v for k, v in row.items() if k not in timed} for row in rows_of(tmp_path / name)]
        for name in ("whole", "cut")
    )
    assert whole == cut


def test_best_holds_the_parameters_with_the_highest_evaluation(tmp_path: Path) -> None:
    """The evaluated updates are saved, whatever `logger.checkpoint_every` says."""
    options = [*CUE, *EVALUATED, "train.total_timesteps=832", "logger.checkpoint_every=100"]
    run_experiment(config(tmp_path, "run", *options))
    found = evaluations(tmp_path / "run")
    assert list(found) == [2, 4, 6, 8, 10, 12, 13]
    assert len(set(found.values())) > 2, "evaluations of different parameters differ"
    best = max(found, key=lambda update: found[update])
    path = tmp_path / "run" / "checkpoints" / "best.pt"
    cfg, agent, content = load_agent(path)
    assert (content["update"], content["best"]) == (best, found[best])
    again = evaluate_update(cfg, agent, best, lambda finished, total: None)
    assert again["eval/success_rate"] == found[best]
    assert again["eval/episodes"] == 24


def test_evaluations_do_not_compete_with_the_scores_of_training(tmp_path: Path, monkeypatch) -> None:
    """A run that goes on with evaluations chooses best.pt by them, however high the scores of training were."""
    run_experiment(config(tmp_path, "run", *CUE, "train.total_timesteps=128"))
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    content = load_checkpoint(path)
    torch.save({**content, "best": 2.0}, path)
    options = [*CUE, *EVALUATED, "train.total_timesteps=256", "resume=auto"]
    run_experiment(config(tmp_path, "run", *options))
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")["update"] == 4


def test_a_run_stops_at_the_score_of_its_evaluation(tmp_path: Path) -> None:
    summary = run_experiment(config(tmp_path, "run", *STOPPED, "logger.eval_episodes=20"))
    found = evaluations(tmp_path / "run")
    *earlier, last = found.values()
    assert last >= 0.6
    assert earlier
    assert max(earlier) < 0.6
    assert summary["stopped_early"]
    assert not summary["is_interrupted"]
    assert summary["total_updates"] == list(found)[-1] == len(rows_of(tmp_path / "run")) < 100
    assert summary["eval_episodes"] == 20, "the evaluation after training"
    rate = 1e-2 * (1 - (summary["total_updates"] - 1) / 100)
    assert float(rows_of(tmp_path / "run")[-1]["learning_rate"]) == pytest.approx(rate), "the schedule is unchanged"
    for name in ("last", "best"):
        content = load_checkpoint(tmp_path / "run" / "checkpoints" / f"{name}.pt")
        assert content["update"] == summary["total_updates"]


def test_a_run_that_has_stopped_does_not_train_on(tmp_path: Path, monkeypatch) -> None:
    def killed(*_: Any) -> None:
        raise SystemExit

    options = [*STOPPED, "logger.eval_episodes=20", "resume=auto"]
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "_evaluate", killed)
        with pytest.raises(SystemExit):
            run_experiment(config(tmp_path, "run", *options))
    before = rows_of(tmp_path / "run")
    summary = run_experiment(config(tmp_path, "run", *options))
    assert (summary["stopped_early"], summary["eval_episodes"]) == (True, 20)
    assert rows_of(tmp_path / "run") == before
    assert run_experiment(config(tmp_path, "run", *options)) == summary
    longer = [*STOPPED[:-2], "train.total_timesteps=12800", STOPPED[-1], "resume=auto"]
    assert run_experiment(config(tmp_path, "run", *longer)) == summary
    # another value to stop at, or a new run from the checkpoint, trains on
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    steps = f"train.total_timesteps={64 * (summary['total_updates'] + 2)}"
    more = config(tmp_path, "run", *CUE, *EVALUATED, steps, "train.stop_at=2", f"resume={path}")
    after = run_experiment(more)
    assert (after["total_updates"], after["stopped_early"]) == (summary["total_updates"] + 2, False)


def test_without_evaluations_a_run_stops_at_the_score_of_its_update(tmp_path: Path) -> None:
    options = [*CUE, "train.total_timesteps=6400", "train.stop_at=0.6", "logger.checkpoint_every=100"]
    summary = run_experiment(config(tmp_path, "run", *options))
    *earlier, last = [float(row["success_rate"]) for row in rows_of(tmp_path / "run")]
    assert last >= 0.6
    assert max(earlier) < 0.6
    assert summary["stopped_early"]
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["update"] == len(earlier) + 1


def test_the_mean_reward_is_the_score_of_tasks_without_success(tmp_path: Path) -> None:
    options = [*CARTPOLE, *EVALUATED, "train.total_timesteps=640", "train.stop_at=5"]
    summary = run_experiment(config(tmp_path, "run", *options))
    assert summary["total_updates"] == 2, "every agent balances the pole for 5 steps"
    assert summary["stopped_early"]


def test_the_line_of_an_update_has_its_evaluation(tmp_path: Path, capsys) -> None:
    run_experiment(config(tmp_path, "run", *CUE, *EVALUATED, "train.total_timesteps=128", "logger.progress=true"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.lstrip().startswith("update ")]
    assert "eval" not in lines[0]
    assert f"  eval {evaluations(tmp_path / 'run')[2]:.3f}  kl" in lines[1]


def test_the_evaluation_is_a_curve_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = [*CUE, *EVALUATED, "train.total_timesteps=320"]
    cfg = config(tmp_path, "run", *options)
    cfg.logger.tensorboard = True
    run_experiment(cfg)
    events = EventAccumulator(str(tmp_path / "run" / "logs")).Reload()
    points = {point.step: point.value for point in events.Scalars("eval/success_rate")}
    assert points == pytest.approx({64 * update: value for update, value in evaluations(tmp_path / "run").items()})
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped_early"] is False
