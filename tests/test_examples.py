"""The examples run as a reader would run them, and learn."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*overrides: str, example: str = "delayed_cue.py") -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / example), *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_written_out_loop_learns() -> None:
    done = run("env.horizon=20", "train.total_timesteps=9000")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["success_rate"] > 0.9
    first_error = float(done.stdout.splitlines()[0].rsplit(maxsplit=1)[1])
    assert first_error < 1e-5


def test_a_mistyped_key_ends_in_one_line() -> None:
    done = run("env.horizn=20")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "horizon" in done.stderr
    assert "Traceback" not in done.stderr


def test_each_run_of_the_curriculum_begins_with_the_one_before(tmp_path: Path) -> None:
    small = ["env.num_envs=4", "train.num_minibatches=2", "train.n_epochs=1", "train.total_timesteps=1"]
    quiet = ["logger.eval_episodes=4", "logger.progress=false", "logger.tensorboard=false"]
    command = [sys.executable, str(EXAMPLES / "curriculum.py"), *small, *quiet, f"logger.base_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [run["horizon"] for run in runs] == [10, 40, 160]
    for before, run in itertools.pairwise(runs):
        manifest = json.loads((Path(run["run_dir"]) / "manifest.json").read_text())
        assert Path(manifest["init_from"]["checkpoint"]).is_relative_to(before["run_dir"])


def test_the_robot_trains(tmp_path: Path) -> None:
    short = ("env.num_envs=4", "train.n_steps=32", "train.seq_len=16", "train.n_epochs=1", "train.total_timesteps=256")
    done = run(*short, "logger.eval_episodes=4", f"logger.base_dir={tmp_path}", example="point_mass.py")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["total_timesteps"] == 256
    expected = "observation.camera [32, 32, 3] as a picture (small convolutions); observation.position [2] as numbers"
    assert expected in done.stderr


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized space")  # it is asymmetric on purpose
def test_the_robots_velocity_is_hidden_and_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    robot = gymnasium.make("point_mass:PointMass-v0").unwrapped
    check_env(robot, skip_render_check=True)
    seen = []
    for velocity in (0.0, 0.1):
        first, _ = robot.reset(seed=3)
        robot.velocity = np.full(2, velocity)
        second = robot.step(np.zeros(2))[0]
        seen.append((first, second))
    for key in ("camera", "position"):
        assert np.array_equal(seen[0][0][key], seen[1][0][key])
    assert not np.array_equal(seen[0][1]["position"], seen[1][1]["position"])
