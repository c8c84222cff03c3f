"""The command: both kinds of action, intervals, other horizons, seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from cyborg_torchrl.cli import play
from cyborg_torchrl.cli.main import main
from cyborg_torchrl.training import evaluation
from cyborg_torchrl.training.loading import load_agent
from cyborg_torchrl.training.run_evaluation import evaluate_agent

Save = Callable[..., Path]


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["evaluate", *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_both_kinds_of_action(save_trained: Save, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_trained("env.horizon=6", "backbone=gru")
    result = evaluated(capsys, str(path), "--episodes", "300")
    cfg, agent, _ = load_agent(path)
    expected = evaluate_agent(cfg, agent, 300)
    assert result["greedy"]["success_rate"] == expected.success_rate
    assert result["greedy"]["mean_reward"] == expected.mean_reward
    assert result["greedy"]["episodes"] == 500
    assert result["greedy"]["mean_length"] == 8.0
    for mode in ("greedy", "sampled"):
        low, high = result[mode]["success_rate_ci95"]
        assert 0.0 <= low <= result[mode]["success_rate"] <= high <= 1.0
        assert 0.005 < high - low < 0.1  # of 500 episodes
        # the reward is 2 success - 1 in this task
        assert result[mode]["mean_reward"] == pytest.approx(2 * result[mode]["success_rate"] - 1)
    assert result["sampled"]["success_rate"] != result["greedy"]["success_rate"]


def test_seeds_and_horizons(save_trained: Save, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(save_trained("env.horizon=6", "backbone=gru"))
    options = (path, "--episodes", "40", "--json")
    first, again = (evaluated(capsys, *options, "--seed", "7") for _ in range(2))
    assert first["sampled"] == again["sampled"]
    assert evaluated(capsys, *options, "--seed", "8")["sampled"] != first["sampled"]
    longer = evaluated(capsys, *options, "env.horizon=9")  # after an option
    assert longer["greedy"]["mean_length"] == 11.0
    assert longer["overrides"] == ["env.horizon=9"]


def test_json_is_all_that_is_printed(save_trained: Save, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_trained("env.horizon=2")
    assert main(["evaluate", str(path), "--episodes", "1", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out)["greedy"]["mean_reward_ci95"] is None


@pytest.mark.parametrize("extra", ["--horizon", "horizon", "-x"])
def test_unknown_arguments_are_refused(extra: str, save_trained: Save, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "agent.pt", "--episodes", "3", extra]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert extra in line


class Endless(gymnasium.Env):
    """Episodes that never end, with a reward of 1 at each step."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), 1.0, False, False, {}


@pytest.fixture
def endless() -> Iterator[str]:
    """Return the id of an environment with such episodes."""
    gymnasium.register("Endless-v0", entry_point=Endless)
    yield "Endless-v0"
    del gymnasium.registry["Endless-v0"]


def test_all_evaluations_end_where_episodes_do_not(
    endless: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "MAX_STEPS", 20)
    monkeypatch.setattr(play, "MAX_STEPS", 20)
    options = ["env=gymnasium", f"env.id={endless}", "env.num_envs=2", "train=tbptt", "train.seq_len=16"]
    sizes = ["train.n_steps=32", "train.num_minibatches=2", "train.total_timesteps=128", "train.n_epochs=1"]
    more = ["logger.tensorboard=false", f"logger.base_dir={tmp_path}", "logger.run_name=run", "logger.eval_every=1"]
    assert main(["train", *options, *sizes, *more]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out.splitlines()[-1])
    assert (summary["eval_episodes"], summary["eval_cut_episodes"], summary["mean_reward"]) == (2, 2, 20.0)
    note = "2 of 2 episodes did not end within 20 steps and were cut"
    assert note in " ".join(err.split())
    assert "(2 episodes cut)" in " ".join(err.split())
    run = str(tmp_path / "run")
    result = evaluated(capsys, run, "--episodes", "1000")
    for mode in ("greedy", "sampled"):
        assert (result[mode]["episodes"], result[mode]["cut_episodes"], result[mode]["mean_length"]) == (2, 2, 20.0)
    assert main(["evaluate", run, "--episodes", "6", "--max-steps", "5"]) == 0
    out, err = capsys.readouterr()
    assert "warning: greedy: 6 of 6 episodes did not end within 5 steps and were cut" in err
    assert json.loads(out.splitlines()[-1])["greedy"]["mean_reward"] == 5.0
    assert main(["play", run, "--episodes", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.count("cut after 20 steps: return 20") == 3
    assert "warning: 3 of 3 episodes did not end within 20 steps and were cut" in err
