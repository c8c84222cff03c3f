"""Runs and sweeps by Hydra: what they leave, how they fail, what they take over."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cyborg_torchrl import jobs, train
from cyborg_torchrl.memory_benchmarks import sweep
from cyborg_torchrl.training.trainer import PPOTrainer

ROOT = Path(__file__).parents[2]
TINY = (
    "env.horizon=4", "env.num_envs=8", "train.total_timesteps=100", "train.n_epochs=1", "logger.eval_episodes=16",
    "logger.tensorboard=false",
)  # fmt: skip
ENTRY_POINT = """\
from cyborg_torchrl.cores import build_gru

def build(in_features: int, *, width: int = 8):
    return build_gru(in_features, hidden_size=width)
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rows_of_jobs(folder: Path) -> list[str]:
    return [row["error"] for row in jobs.read_jobs(folder)]


def test_one_run_leaves_its_folder_and_nothing_else(tmp_path: Path, capsys) -> None:
    assert train.main([*TINY, "backbone=gru", "logger.run_name=r", "logger.progress=false"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == json.loads((tmp_path / "runs" / "r" / "summary.json").read_text())
    assert summary["backbone"] == "gru"
    assert os.listdir(tmp_path) == ["runs"]
    assert os.listdir(tmp_path / "runs") == ["r"]
    assert not list(tmp_path.rglob(".hydra"))


def test_a_sweep_runs_all_combinations_and_takes_over_what_has_ended(tmp_path: Path, capsys, monkeypatch) -> None:
    returned = []
    run = functools.wraps(jobs.run_job)(lambda cfg: returned.append(jobs.run_job(cfg)))
    monkeypatch.setattr(train, "run_job", run)
    arguments = ["-m", *TINY, "backbone=gru,lru", "train.seed=range(2)", "hydra.sweep.dir=s", "train.gamma=0.9"]
    assert train.main(arguments) == 0
    folders = {path.name for path in (tmp_path / "s").iterdir() if path.is_dir()}
    assert folders == {
        f"delayed_cue-{backbone}-h4-t100-s{seed}_env.num_envs_8_train.n_epochs_1_train.gamma_0.9"
        for backbone in ("gru", "lru")
        for seed in range(2)
    }
    summaries = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "s").glob("*/summary.json")}
    assert returned == [summaries[name]["success_rate"] for name in sorted(folders)], "in Hydra's order"
    cells = sweep.read_rows(tmp_path / "s" / "results.csv")
    assert {cell.folder for cell in cells} == folders, "the sweep's own reader finds the same folders"
    assert all(float(row["success_rate"]) == summaries[cell.folder]["success_rate"] for cell, row in cells.items())
    assert "2" in capsys.readouterr().out, "a table with two seeds a line"

    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    assert train.main([*arguments[:-3], "train.seed=range(3)", *arguments[-2:]]) == 0, "with one seed more"
    rows = rows_of(tmp_path / "s")
    assert len(rows) == 6
    kept = [path for path in before if path.name in ("manifest.json", "metrics.csv", "last.pt", "summary.json")]
    assert len(kept) == 16
    assert all(path.read_bytes() == before[path] for path in kept)


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path, monkeypatch) -> None:
    arguments = ["-m", *TINY, "train.seed=0", "hydra.sweep.dir=s"]
    run = PPOTrainer.update

    def interrupted(self, rollout):
        if self.num_updates == 1:
            raise KeyboardInterrupt
        return run(self, rollout)

    monkeypatch.setattr(PPOTrainer, "update", interrupted)
    assert train.main([*arguments]) == 130
    assert rows_of_jobs(tmp_path / "s") == ["has not ended"]
    monkeypatch.setattr(PPOTrainer, "update", run)
    assert train.main([*arguments]) == 0
    (folder,) = (path.parent for path in (tmp_path / "s").glob("*/manifest.json"))
    assert len(json.loads((folder / "manifest.json").read_text())["resumed"]) == 1
    assert rows_of_jobs(tmp_path / "s") == [""]


def test_a_failing_run_leaves_the_others_alone(tmp_path: Path, capsys, monkeypatch) -> None:
    train_well = jobs.run_experiment

    def run(cfg):
        if cfg.train.seed == 1:
            raise RuntimeError("the disk\nis full")
        return train_well(cfg)

    monkeypatch.setattr(jobs, "run_experiment", run)
    arguments = ["-m", *TINY, "train.gamma=0.9,2", "train.seed=0,1", "hydra.sweep.dir=s"]
    assert train.main(arguments) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "Traceback" not in "".join(errors)
    found = {(row["overrides"].split("gamma=")[1], row["seed"]): row["error"] for row in rows_of(tmp_path / "s")}
    assert found["0.9", "0"] == ""
    assert found["0.9", "1"] == "RuntimeError: the disk is full (see error.txt in its folder)"
    assert found["2", "0"] == found["2", "1"] == "train.gamma must lie in [0, 1]; got 2.0."
    (trace,) = (tmp_path / "s").glob("*/error.txt")
    assert "Traceback" in trace.read_text()


def test_an_interrupted_run_ends_the_sweep(tmp_path: Path, monkeypatch, capsys) -> None:
    ran = []
    monkeypatch.setattr(jobs, "run_experiment", lambda cfg: ran.append(cfg) or {"is_interrupted": True})
    assert train.main(["-m", *TINY, "train.seed=0,1", "hydra.sweep.dir=s"]) == 130
    assert len(ran) == 1
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["backbone=gruu"], "unknown backbone 'gruu': did you mean 'gru'?"),
        (["train.sed=1"], "unknown key 'train.sed': did you mean 'train.seed'?"),
        (["train.gamma=2"], "train.gamma must lie in [0, 1]; got 2.0."),
        (["env.horizon=-1"], "horizon must be >= 0; got -1"),
        (["backbone=gru,lru"], "'backbone=gru,lru' has several values: give -m to run all of them."),
        (["-m", "backbone=gru,lruu"], "unknown backbone 'lruu': did you mean 'lru'?"),
        (["-m", "backbone=gru,lru", "train.sed=1,2"], "unknown key 'train.sed': did you mean 'train.seed'?"),
        (["-m", "env.horizon=3,x"], "impossible value in 'env.horizon=x'"),
        (["-m", "train.seed=0,1", "train.gamma=2"], "train.gamma must lie in [0, 1]; got 2.0."),
        (["-m", "train.seed=0,1", "hydra/launcher=joblibb"], "unknown hydra/launcher 'joblibb': did you mean"),
        (["-m", "train.seed=0,1", f"hydra.sweep.dir={__file__}"], "hydra.sweep.dir: cannot write to"),
        (["--config-name", "x"], "give --config NAME_OR_FILE"),
        (["--config", "nowhere.yaml"], "no configuration file 'nowhere.yaml'"),
    ],
)
def test_what_is_wrong_for_all_is_one_line_before_anything_runs(arguments, expected, tmp_path: Path, capsys) -> None:
    assert train.main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if not line.startswith("runs are in ")]
    assert line.startswith("error: ")
    assert expected in line
    assert not captured.out
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_file_of_ones_own_is_swept_over(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("backbone: gru\ntrain: {n_epochs: 1, learning_rate: 0.001}\n")
    tiny = [override for override in TINY if "n_epochs" not in override]
    assert train.main(["--config", "mine.yaml", "-m", *tiny, "train.seed=0,1", "hydra.sweep.dir=s"]) == 0
    rows = rows_of(tmp_path / "s")
    assert {(row["backbone"], row["seed"], row["config"]) for row in rows} == {
        ("gru", "0", "mine.yaml"),
        ("gru", "1", "mine.yaml"),
    }


def test_help_says_what_there_is(capsys) -> None:
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "hydra/launcher=joblib" in text
    assert re.search(r"^backbone: gru, .*lru", text, re.MULTILINE)
    assert "recurrent_mode: episode" in text


def test_processes_of_joblib_know_installed_components(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher.joblib_launcher")
    installed = tmp_path / "installed"
    (installed / "outside-1.0.dist-info").mkdir(parents=True)
    (installed / "outside.py").write_text(ENTRY_POINT)
    (installed / "outside-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n"
    )
    (installed / "outside-1.0.dist-info" / "entry_points.txt").write_text(
        "[cyborg_torchrl.backbones]\noutside = outside:build\n"
    )
    command = [sys.executable, "-m", "cyborg_torchrl.train", "-m", *TINY, "backbone=outside", "backbone.width=4,6"]
    command += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=s"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{installed}"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "s")
    assert len(rows) == 2
    assert {row["backbone"] for row in rows} == {"outside"}
    assert not any(row["error"] for row in rows)
    assert sorted(os.listdir(tmp_path)) == ["installed", "s"]
