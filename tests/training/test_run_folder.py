"""A run's name is taken by its results, and not by an attempt that failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.training.checkpoint import load_checkpoint
from cyborg_torchrl.training.experiment import run_experiment
from cyborg_torchrl.training.run_folder import lock_run
from cyborg_torchrl.training.trainer import PPOTrainer

TINY = ["env.horizon=4", "env.num_envs=8", "train.n_epochs=1", "train.total_timesteps=100", "logger.progress=false"]
TINY += ["logger.eval_episodes=0"]


def train(base: Path, *options: str) -> dict:
    return run_experiment(load_config(overrides=[*TINY, f"logger.base_dir={base}", "logger.run_name=run", *options]))


def fail(base: Path, update: int, *options: str) -> None:
    """Train until an update fails."""
    original = PPOTrainer.update

    def broken(trainer: PPOTrainer, rollout):
        if trainer.num_updates == update:
            raise RuntimeError("boom")
        return original(trainer, rollout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPOTrainer, "update", broken)
        with pytest.raises(RuntimeError, match="boom"):
            train(base, *options)


@pytest.mark.parametrize("mistake", ["train.num_minibatches=100", "train.freeze=[no_such_part]", "init_from=nothing"])
def test_a_run_that_cannot_be_built_creates_nothing(mistake: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_minibatches|no_such_part|nothing"):
        train(tmp_path, mistake)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [[], ["train.gamma=0.5"], ["train.gamma=0.5", "resume=auto"], ["resume=auto"]])
def test_a_run_that_failed_before_its_first_checkpoint_does_not_block_its_name(
    options: list[str], tmp_path: Path
) -> None:
    fail(tmp_path / "a", 0)
    fail(tmp_path / "a", 1, "logger.checkpoint_every=9")
    assert train(tmp_path / "a", *options)["total_updates"] == 2
    train(tmp_path / "b", *options)
    after_failure, alone = (load_checkpoint(tmp_path / base / "run/checkpoints/last.pt")["agent"] for base in "ab")
    assert all(torch.equal(after_failure[name], alone[name]) for name in alone)
    assert len((tmp_path / "a/run/logs/metrics.csv").read_text().splitlines()) == 3, "a header and two updates"


@pytest.mark.parametrize("options", [[], ["train.gamma=0.5", "resume=auto"]])
def test_results_are_never_overwritten(options: list[str], tmp_path: Path) -> None:
    fail(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"choose another run name|is a run of another configuration"):
        train(tmp_path, *options)
    train(tmp_path, "resume=auto")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        checkpoint.unlink()  # to save space
    with pytest.raises(ConfigError, match=r"choose another run name|is a run of another configuration"):
        train(tmp_path, *options)
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_run_without_a_checkpoint_that_another_process_trains_keeps_its_name(tmp_path: Path) -> None:
    fail(tmp_path, 0)
    lock = lock_run(tmp_path / "run")
    assert lock is not None
    with pytest.raises(ConfigError, match="another process is training"):
        train(tmp_path)
    lock.close()
