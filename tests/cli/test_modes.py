"""Whole runs with every recurrent mode, some collectors, and every storage."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import modes
from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.training.experiment import run_experiment

SMALL = ("env.horizon=20", "env.num_envs=16", "train.total_timesteps=704", "train.n_epochs=2", "logger=quiet")
CHOICES = {
    "none": ("train=none",),
    "tbptt": ("train=tbptt", "train.seq_len=5"),
    "stride": ("train=tbptt", "train.seq_len=4", "train.state_stride=12"),
    "burn_in": ("train=burn_in", "train.seq_len=6", "train.burn_in=9"),
    "one_step": ("train=burn_in", "train.seq_len=1"),
    "long_stride": ("train=tbptt", "train.seq_len=1000", "train.state_stride=2000"),
    "refreshed": ("train=tbptt", "train.seq_len=5", "train.refresh_states=true"),
    "memmap": ("train=tbptt", "train.seq_len=5", "train.storage=memmap"),
    "device": ("train=episode", "train.storage=device"),
    "episode": ("train=episode", "train.n_steps=35", "train.total_timesteps=1120"),
    "torchrl": ("train=burn_in", "train.seq_len=6", "train.burn_in=3", "collector=single"),
}


def log_of(summary: dict) -> list[dict[str, str]]:
    with (Path(summary["run_dir"]) / "logs" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("choice", CHOICES)
def test_a_run_has_no_ratio_error(tmp_path: Path, choice: str) -> None:
    overrides = [*SMALL, *CHOICES[choice], f"logger.base_dir={tmp_path}", "logger.eval_episodes=16"]
    summary = run_experiment(load_config(overrides=overrides))
    log = log_of(summary)
    assert len(log) == 2
    for update in log:
        assert float(update["ratio_error"]) <= 1e-5
        assert float(update["state_drift"]) >= 0.0


def test_an_initial_start_state_has_a_ratio_error(tmp_path: Path) -> None:
    overrides = [*SMALL, "train=tbptt", "train.seq_len=5", "train.start_state=initial", f"logger.base_dir={tmp_path}"]
    summary = run_experiment(load_config(overrides=[*overrides, "logger.eval_episodes=0"]))
    assert float(log_of(summary)[0]["ratio_error"]) > 1e-3


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train=tbptt", "train.seq_len=null"], "train.seq_len must be given"),
        (["train=tbptt", "train.seq_len=5", "train.state_stride=12"], "the nearest is 10"),
        (["train=tbptt", "train.seq_len=5", "train.burn_in=2"], "train.burn_in belongs to recurrent_mode=burn_in"),
        (
            ["train=tbptt", "train.seq_len=5", "train.state_stride=10", "train.refresh_states=true"],
            "leave train.state_stride out",
        ),
        (["train=burn_in", "train.start_state=zero"], "unknown train.start_state 'zero'"),
        (["train=burn_in", "train.state_stride=50"], "train.state_stride needs train.seq_len"),
        (
            ["train=episode", "train.state_dtype=bfloat16"],
            "train.state_dtype belongs to recurrent_mode=burn_in or tbptt",
        ),
    ],
)
def test_options_that_exclude_each_other(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(overrides=overrides)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_comparison_of_modes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "modes.png"
    arguments = ["--arms", "no memory", "stored (tbptt)", "--seeds", "2", "--total-timesteps", "6144"]
    arguments += ["--base-dir", str(tmp_path), "--plot", str(picture)]
    assert modes.main(arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/logs/metrics.csv")}
    assert len(before) == 4
    assert modes.main(arguments) == 0, "the second call only reads the finished runs"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "stored (tbptt)" in capsys.readouterr().out
    assert picture.stat().st_size > 10_000
