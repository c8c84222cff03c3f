"""Environments and backbones of a script: `--import` makes them known to every command and every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cyborg_torchrl.cli.main import main
from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.config.imports import import_components

ROOT = Path(__file__).parents[2]
MODULE = """\
import gymnasium
import numpy as np

from cyborg_torchrl import register_backbone, register_environment
from cyborg_torchrl.cores import MemorylessCore, build_gru
from cyborg_torchrl.envs.gym.batch import batch
from cyborg_torchrl.envs.gym.environment import wrap


class OwnCore(MemorylessCore):
    pass


class OwnEnv(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_count = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.step_count += 1
        return np.ones(2, np.float32), float(action), self.step_count == 4, False, {}


def make():
    return wrap(OwnEnv())


@register_backbone("NAME_core")
def build_core(in_features: int, *, width: int = 8):
    return OwnCore(build_gru(in_features, hidden_size=width))


@register_environment("NAME_env")
def build_env(num_envs: int = 4, *, workers: int = 0, device=None, seed=None):
    return batch(make, num_envs, workers=workers, max_episode_steps=4, device=device, seed=seed)
"""
TINY = (
    "train.total_timesteps=64", "train.n_epochs=1", "train.num_minibatches=2", "logger=quiet", "logger.eval_episodes=4",
)  # fmt: skip


def write_module(folder: Path, name: str) -> Path:
    """Write a module whose components have its name: each test needs another one, since a process keeps modules."""
    pytest.importorskip("gymnasium")
    path = folder / f"{name}.py"
    path.write_text(MODULE.replace("NAME", name))
    return path


def components(name: str) -> list[str]:
    return [f"env={name}_env", f"backbone={name}_core", *TINY]


def command(*arguments: str, cwd: Path) -> str:
    """Run the command line in another process, and return its stdout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "cyborg_torchrl", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_imports_its_modules_again_in_another_process_and_folder(tmp_path: Path) -> None:
    path = write_module(tmp_path, "mine_again")
    (tmp_path / "elsewhere").mkdir()
    run = ["--import", "mine_again.py", *components("mine_again"), "env.workers=2", "logger.run_name=r"]
    command("train", *run, cwd=tmp_path)
    folder = tmp_path / "runs" / "r"
    assert yaml.safe_load((folder / "config.yaml").read_text())["imports"] == [str(path)]
    shown = command("evaluate", str(folder), "--episodes", "4", "--json", cwd=tmp_path / "elsewhere")
    assert json.loads(shown)["greedy"]["mean_length"] == 4


@pytest.mark.slow
def test_a_run_is_continued_with_its_modules(tmp_path: Path) -> None:
    write_module(tmp_path, "mine_continued")
    (tmp_path / "elsewhere").mkdir()
    command("train", "--import", "mine_continued.py", *components("mine_continued"), "logger.run_name=r", cwd=tmp_path)
    more = ["train", f"resume={tmp_path / 'runs' / 'r'}", "train.total_timesteps=128"]
    assert json.loads(command(*more, cwd=tmp_path / "elsewhere").splitlines()[-1])["total_timesteps"] == 128


def test_a_module_that_was_moved_is_named_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_module(tmp_path, "mine_moved")
    command("train", "--import", "mine_moved.py", *components("mine_moved"), "logger.run_name=r", cwd=tmp_path)
    path = path.rename(tmp_path / "runs" / "mine_moved.py")
    run = str(tmp_path / "runs" / "r")
    assert main(["evaluate", run, "--episodes", "4"]) == 2
    assert "if it was moved: --import NEW_PATH" in capsys.readouterr().err
    assert main(["evaluate", run, "--episodes", "4", "--import", str(path)]) == 0


@pytest.mark.parametrize("collector", ["multi_sync", pytest.param("ray", marks=pytest.mark.slow)])
def test_worker_processes_know_the_components(tmp_path: Path, collector: str) -> None:
    if collector == "ray":
        pytest.importorskip("ray")
    write_module(tmp_path, f"mine_{collector}")
    options = [*components(f"mine_{collector}"), f"collector={collector}", "logger.eval_episodes=0", "train.n_steps=16"]
    shown = command("train", "--import", f"mine_{collector}", *options, cwd=tmp_path)
    assert json.loads(shown.splitlines()[-1])["total_timesteps"] == 64


def test_the_processes_of_a_sweep_know_the_components(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    write_module(tmp_path, "mine_sweep")
    options = [*components("mine_sweep"), "train.seed=0,1", "--jobs", "2", "--folder", "sweep"]
    command("sweep", "--import", "mine_sweep.py", *options, cwd=tmp_path)
    names = {path.parent.name for path in (tmp_path / "sweep").glob("*/summary.json")}
    assert len(names) == 2
    assert not any("imports" in name for name in names)


def test_the_checker_knows_an_imported_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_module(tmp_path, "mine_checked")
    assert main(["check", "--import", str(path), "--backbone", "mine_checked_cor"]) == 2
    assert "did you mean 'mine_checked_core'" in capsys.readouterr().err


def test_a_file_can_name_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = write_module(tmp_path, "mine_first"), write_module(tmp_path, "mine_second")
    (tmp_path / "config.yaml").write_text("imports: [mine_first.py]\nenv: mine_first_env\n")
    cfg = load_config("config.yaml", ["backbone=mine_second_core", "imports=[mine_second.py]"])
    assert cfg.imports == [str(first), str(second)]
    assert load_config("config.yaml").imports == [str(first)]
    assert load_config().imports == []


@pytest.mark.parametrize(
    ("target", "text", "message"),
    [
        ("nothing_there", None, r"cannot import 'nothing_there' \(ModuleNotFoundError"),
        ("nothing_there.py", None, "there is no file '.*nothing_there.py' to import"),
        ("mine_broken.py", "import mine_unknown_package", "No module named 'mine_unknown_package'"),
        ("random.py", "", "another module is called 'random'; rename the file"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch, target, text, message) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(target).write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(overrides=[f"imports=[{target}]"])
    assert "\n" not in str(caught.value)


def test_a_module_is_imported_once(tmp_path: Path) -> None:
    path = write_module(tmp_path, "mine_once")
    (module,) = import_components([str(path)])
    assert import_components([str(path), str(tmp_path / "old" / "mine_once.py")]) == [module, module]
