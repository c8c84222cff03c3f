"""The command: both kinds of action, intervals, other horizons, seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cyborg_torchrl.cli.main import main
from cyborg_torchrl.training.experiment import evaluate_agent
from cyborg_torchrl.training.loading import load_agent

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
