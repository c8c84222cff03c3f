"""Learning runs of the memory tasks that need options of their own: slow, with a marker of their own."""

import pytest

from cyborg_torchrl.config import load_config
from cyborg_torchrl.training.experiment import run_experiment


@pytest.mark.learning
@pytest.mark.parametrize("seed", range(3))
def test_a_corridor_of_a_thousand(tmp_path, seed):
    changes = [f"train.seed={seed}", f"logger.base_dir={tmp_path}", "logger=quiet", "env.num_envs=16"]
    cfg = load_config(overrides=["env=tmaze", "env.level=hard", "train.total_timesteps=1000000", *changes])
    assert run_experiment(cfg)["success_rate"] >= 0.95


@pytest.mark.learning
@pytest.mark.parametrize("backbone", ["lru", "gru"])
def test_answers_at_every_step_do_not_undo_each_other(tmp_path, backbone):
    changes = [f"logger.base_dir={tmp_path}", "logger=quiet", f"backbone={backbone}"]
    assert run_experiment(load_config(overrides=["env=n_back", "env.level=easy", *changes]))["success_rate"] >= 0.85
