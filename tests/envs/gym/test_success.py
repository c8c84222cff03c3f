"""What gymnasium environments report as success, in whichever form and whenever, becomes the success rate."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")

from cyborg_torchrl.config import load_config  # noqa: E402
from cyborg_torchrl.envs.gym.environment import build_gymnasium  # noqa: E402
from cyborg_torchrl.training.builders import build_env  # noqa: E402
from cyborg_torchrl.training.checkpoint import load_checkpoint  # noqa: E402
from cyborg_torchrl.training.distributed import Ranks  # noqa: E402
from cyborg_torchrl.training.evaluation import evaluate  # noqa: E402
from cyborg_torchrl.training.experiment import run_experiment  # noqa: E402
from cyborg_torchrl.training.trainer import rollout_metrics  # noqa: E402

LENGTH = 3
SILENT_EPISODES = 2


class Goal(gymnasium.Env):
    """Episodes of three steps that succeed if the last action is 1. `style` says how that is reported."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, style: str) -> None:
        self.style, self.episode = style, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.step_count = 0
        self.episode += 1
        return np.zeros(1, np.float32), {"is_success": True} if self.style == "reset" else {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.step_count += 1
        is_last, is_reached = self.step_count == LENGTH, bool(action == 1)
        reward = float(self.style == "late" and self.episode <= SILENT_EPISODES + 1)
        return np.zeros(1, np.float32), reward, False, is_last, self._info(is_last, is_reached)

    def _info(self, is_last: bool, is_reached: bool) -> dict[str, Any]:
        reports: dict[str, Any] = {
            "every_step": {"is_success": np.float32(is_reached)},
            "last_step": {"is_success": is_reached} if is_last else {},
            "success": {"success": np.bool_(is_reached)} if is_last else {},
            "array": {"is_success": np.array([float(is_reached)])} if is_last else {},
            "only_successes": {"is_success": True} if is_last and is_reached else {},
            "late": {"is_success": is_reached} if is_last and self.episode > SILENT_EPISODES + 1 else {},
            "both": {"success": "unknown", "is_success": is_reached} if is_last else {},
            "share": {"success": 0.25} if is_last else {},
        }
        return reports.get(self.style, {"text": "nothing"})


@pytest.fixture(params=["every_step", "last_step", "success", "array", "only_successes", "late", "both"])
def style(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _registered() -> None:
    if "Goal-v0" not in gymnasium.registry:
        gymnasium.register("Goal-v0", Goal)


def options(style: str) -> list[str]:
    return ["env=gymnasium", "id=Goal-v0", f"env.options={{style: {style}}}", "env.num_envs=4"]


def played(style: str, episodes: int, workers: int = 0) -> torch.Tensor:
    """Return the successes [4, steps] if only the first environment takes the right actions."""
    env = build_gymnasium(id="Goal-v0", num_envs=4, options={"style": style}, workers=workers)
    rows, tensordict = [], env.reset()
    for _ in range(LENGTH * episodes):
        tensordict["action"] = torch.tensor([1, 0, 0, 0])
        step, tensordict = env.step_and_maybe_reset(tensordict)
        rows.append(step["next", "success"][:, 0])
    return torch.stack(rows, 1)


def test_every_form_is_read(style: str) -> None:
    ends = played(style, SILENT_EPISODES + 2)[:, LENGTH - 1 :: LENGTH]
    assert ends[:, -1].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert bool(ends[:, 0].isnan().all()) == (style == "late")


@pytest.mark.parametrize("style", ["silent", "reset"])
def test_environments_that_report_nothing_have_no_success_rate(style: str, tmp_path: Path) -> None:
    assert bool(played(style, 2).isnan().all())
    shown = ["train.total_timesteps=64", "train.n_steps=16", "train.n_epochs=1", "train.num_minibatches=2"]
    more = ["logger=quiet", f"logger.base_dir={tmp_path}", "logger.eval_episodes=4"]
    summary = run_experiment(load_config(overrides=[*options(style), *shown, *more]))
    assert summary["success_rate"] is None
    assert summary["train_success_rate"] is None
    assert summary["mean_reward"] == 0.0


def test_silence_counts_as_failure_once_another_episode_has_reported() -> None:
    ended = torch.tensor([1.0, torch.nan, torch.nan, torch.nan])
    assert success_rate(ended) == 0.25
    assert success_rate(torch.full((4,), torch.nan)) is None
    assert success_rate(torch.tensor([0.0, 0.0, torch.nan, torch.nan])) == 0.0


def success_rate(ended: torch.Tensor) -> float | None:
    """Return the metric of a rollout of four environments whose only step ends their episodes."""
    from tensordict import TensorDict

    zeros = torch.zeros(4, 1, 1)
    after = {"done": torch.ones(4, 1, 1, dtype=torch.bool), "reward": zeros, "success": ended.reshape(4, 1, 1)}
    rollout = TensorDict({"next": after, "state_value": zeros, "value_target": zeros}, [4, 1])
    return rollout_metrics(rollout, Ranks()).get("success_rate")


def test_evaluation_reads_it_too(style: str) -> None:
    from tensordict.nn import TensorDictModule

    env = build_env(load_config(overrides=options(style)))
    policy = TensorDictModule(lambda shown: torch.tensor([1, 0, 0, 0]), ["observation"], ["action"])
    result = evaluate(policy, env, 4 * (SILENT_EPISODES + 1))
    expected = 2 / 12 if style == "late" else 3 / 12  # the first episodes were silent, and count as failures
    assert result.success_rate == pytest.approx(expected)


def test_the_best_checkpoint_is_chosen_by_success_from_its_first_report_on(tmp_path: Path) -> None:
    """Each update has an episode of each environment; the first ones report nothing, and have the highest returns."""
    more = ["train.n_steps=3", "train.total_timesteps=60", "train.n_epochs=1", "train.num_minibatches=1"]
    more += ["logger=quiet", f"logger.base_dir={tmp_path}", "logger.run_name=r", "logger.eval_episodes=0"]
    run_experiment(load_config(overrides=[*options("late"), *more]))
    with (tmp_path / "r" / "logs" / "metrics.csv").open() as file:
        rates = {int(row["update"]): row["success_rate"] for row in csv.DictReader(file)}
    assert rates[1] == ""
    best = load_checkpoint(tmp_path / "r" / "checkpoints" / "best.pt")
    assert float(rates[best["update"]]) == best["best"] == max(float(rate) for rate in rates.values() if rate)


def test_shares_are_kept() -> None:
    assert played("share", 1)[:, -1].tolist() == [0.25] * 4
