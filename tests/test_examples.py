"""The examples run as a reader would run them, and learn."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "delayed_cue.py"


def run(*overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(EXAMPLE), *overrides], capture_output=True, text=True, check=False)


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
    command = [sys.executable, str(EXAMPLE.with_name("curriculum.py")), *small, *quiet, f"logger.base_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [run["horizon"] for run in runs] == [10, 40, 160]
    for before, run in itertools.pairwise(runs):
        manifest = json.loads((Path(run["run_dir"]) / "manifest.json").read_text())
        assert Path(manifest["init_from"]["checkpoint"]).is_relative_to(before["run_dir"])
