"""Training by Hydra: one run, and sweeps. Which files they leave, how they fail, how they continue."""

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
import torch

from cyborg_torchrl.cli import sweep
from cyborg_torchrl.cli.main import main
from cyborg_torchrl.memory_benchmarks.results import read_rows
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


def errors_of(folder: Path) -> list[str]:
    return [row["error"] for row in read_rows(folder)]


def test_one_run_leaves_its_folder_and_nothing_else(tmp_path: Path, capsys) -> None:
    assert main(["train", *TINY, "backbone=gru", "logger.run_name=r", "logger.progress=false"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == json.loads((tmp_path / "runs" / "r" / "summary.json").read_text())
    assert summary["backbone"] == "gru"
    assert os.listdir(tmp_path) == ["runs"]
    assert os.listdir(tmp_path / "runs") == ["r"]
    assert not list(tmp_path.rglob(".hydra"))


@pytest.mark.parametrize("has_instructions", [True, False])
def test_autocast_on_a_processor_without_it_warns(has_instructions: bool, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_instructions}, raising=False)
    options = ("encoder.autocast=bfloat16", "logger.eval_episodes=0", "logger.progress=false")
    assert main(["train", *TINY, "backbone=gru", *options]) == 0
    warning = "warning: this CPU has no instructions for bfloat16, so encoder.autocast=bfloat16 is slower than float32"
    assert (warning in capsys.readouterr().err) is not has_instructions


def test_a_sweep_runs_all_combinations_and_keeps_finished_runs(tmp_path: Path, capsys, monkeypatch) -> None:
    returned, run_job = [], sweep.run_job
    run = functools.wraps(run_job)(lambda cfg: returned.append(run_job(cfg)))
    monkeypatch.setattr(sweep, "run_job", run)
    arguments = ["sweep", *TINY, "--folder", "s", "--markdown", "table.md", "train.gamma=0.9", "backbone=gru,lru"]
    assert main([*arguments, "train.seed=range(2)"]) == 0
    folders = {path.name for path in (tmp_path / "s").iterdir() if path.is_dir()}
    fixed = "env.horizon-4__env.num_envs-8__train.gamma-0.9__train.n_epochs-1__train.total_timesteps-100"
    assert folders == {
        f"backbone-{backbone}__{fixed}__train.seed-{seed}" for backbone in ("gru", "lru") for seed in range(2)
    }
    summaries = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "s").glob("*/summary.json")}
    assert returned == [summaries[name]["success_rate"] for name in sorted(folders)], "in Hydra's order"
    rows = rows_of(tmp_path / "s")
    assert {row["run"] for row in rows} == folders
    assert all(float(row["success_rate"]) == summaries[row["run"]]["success_rate"] for row in rows)
    out = capsys.readouterr().out
    scores = [f"{summaries[name]['success_rate']:.2f}" for name in sorted(folders)]
    assert f"{scores[0]} {scores[1]}" in out, "a line has the scores of two seeds"
    assert "95 %" in out
    assert len((tmp_path / "table.md").read_text().splitlines()) == 4

    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    assert main([*arguments, "train.seed=range(3)"]) == 0, "with one seed more"
    assert len(rows_of(tmp_path / "s")) == 6
    kept = [path for path in before if path.name in ("manifest.json", "metrics.csv", "last.pt", "summary.json")]
    assert len(kept) == 16
    assert all(path.read_bytes() == before[path] for path in kept)


def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch) -> None:
    arguments = ["sweep", *TINY, "train.seed=0", "--folder", "s"]
    run = PPOTrainer.update

    def interrupted(self, rollout):
        if self.num_updates == 1:
            raise KeyboardInterrupt
        return run(self, rollout)

    monkeypatch.setattr(PPOTrainer, "update", interrupted)
    assert main(arguments) == 130
    assert errors_of(tmp_path / "s") == ["not finished"]
    monkeypatch.setattr(PPOTrainer, "update", run)
    assert main(arguments) == 0
    (folder,) = (path.parent for path in (tmp_path / "s").glob("*/manifest.json"))
    assert len(json.loads((folder / "manifest.json").read_text())["resumed"]) == 1
    assert errors_of(tmp_path / "s") == [""]


def test_a_failing_run_leaves_the_others_alone(tmp_path: Path, capsys, monkeypatch) -> None:
    train_well = sweep.run_experiment

    def run(cfg):
        if cfg.train.seed == 1:
            raise RuntimeError("the disk\nis full")
        return train_well(cfg)

    monkeypatch.setattr(sweep, "run_experiment", run)
    arguments = ["sweep", *TINY, "train.gamma=0.9,2", "train.seed=0,1", "--folder", "s"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    listed = [line for line in captured.out.splitlines() if line.startswith("failed: ")]
    assert [line.removeprefix("failed: ") for line in listed] == sorted(line.partition(", ")[2] for line in errors), (
        "once more below the table"
    )
    assert "Traceback" not in "".join(errors)
    found = {(row["train.gamma"], row["seed"]): row["error"] for row in rows_of(tmp_path / "s")}
    assert found["0.9", "0"] == ""
    assert found["0.9", "1"] == "RuntimeError: the disk is full (see error.txt in its folder)"
    assert found["2", "0"] == found["2", "1"] == "train.gamma must lie in [0, 1]; got 2.0."
    (trace,) = (tmp_path / "s").glob("*/error.txt")
    assert "Traceback" in trace.read_text()


def test_results_survive_a_later_sweep_that_is_refused_or_fails(tmp_path: Path, capsys, monkeypatch) -> None:
    file = tmp_path / "mine.yaml"
    arguments = ["sweep", "--config", str(file), "train.seed=0,1", "--folder", "s"]
    common = "env: {horizon: 4, num_envs: 8}\nlogger: {eval_episodes: 8, tensorboard: false}\n"

    def run(*train: str) -> int:
        file.write_text(f"{common}train: {{{', '.join(('n_epochs: 1', *train))}}}\n")
        return main(arguments)

    assert run("total_timesteps: 100") == 0
    (first,), rows = {len(rows_of(tmp_path / "s"))}, rows_of(tmp_path / "s")
    assert first == 2
    capsys.readouterr()

    assert run("total_timesteps: 100", "gamma: 0.5") == 1, "refused: the folders have runs of another configuration"
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if "is a run of another configuration: train.gamma" in line]) == 2
    assert rows_of(tmp_path / "s") == rows

    def broken(self, rollout):
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "update", broken)
        assert run("total_timesteps: 200") == 1, "more steps, but they fail"
    assert "RuntimeError: boom" in capsys.readouterr().out
    assert rows_of(tmp_path / "s") == rows

    assert run("total_timesteps: 200") == 0
    assert [int(row["total_timesteps"]) for row in rows_of(tmp_path / "s")] == [192, 192]
    assert "failed" not in capsys.readouterr().out


def test_an_interrupted_run_ends_the_sweep(tmp_path: Path, monkeypatch, capsys) -> None:
    ran = []
    monkeypatch.setattr(sweep, "run_experiment", lambda cfg: ran.append(cfg) or {"is_interrupted": True})
    assert main(["sweep", *TINY, "train.seed=0,1", "--folder", "s"]) == 130
    assert len(ran) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; the same command with --folder s continues"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "backbone=gruu"], "unknown backbone 'gruu': did you mean 'gru'?"),
        (["train", "train.sed=1"], "unknown key 'train.sed': did you mean 'train.seed'?"),
        (["train", "train.gamma=2"], "train.gamma must lie in [0, 1]; got 2.0."),
        (["train", "env.horizon=-1"], "horizon must be >= 0; got -1"),
        (["train", "backbone=gru,lru"], "'backbone=gru,lru' has several values: cyborg-torchrl sweep runs all of them"),
        (["train", "backbone=(gru"], "cannot read 'backbone=(gru': overrides look like key=value"),
        (["train", "--cfg", "x"], "argument --cfg: invalid choice: 'x'"),
        (["train", "--config-name", "x"], "unrecognized arguments: --config-name: did you mean '--config'?"),
        (["train", "--config", "nowhere.yaml"], "no configuration file 'nowhere.yaml'"),
        (["sweep", "backbone=gru,lruu"], "unknown backbone 'lruu': did you mean 'lru'?"),
        (["sweep", "backbone=gru,lru", "train.sed=1,2"], "unknown key 'train.sed': did you mean 'train.seed'?"),
        (["sweep", "env.horizon=3,x"], "impossible value in 'env.horizon=x'"),
        (["sweep", "train.seed=0,1", "train.gamma=2"], "train.gamma must lie in [0, 1]; got 2.0."),
        (["sweep", "train.seed=0,1", "hydra/launcher=joblibb"], "unknown hydra/launcher 'joblibb': did you mean"),
        (["sweep", "train.seed=0,1", "--folder", __file__], "--folder: cannot write to"),
        (["sweep", "train.seed=0,1", "hydra.sweep.dir=x"], "--folder replaces hydra.sweep.dir"),
        (["sweep", "train.seed=0,1", "logger.run_name=x"], "a sweep names its runs"),
        (["sweep", "train.seed=0,1", "resume=runs/x"], "a sweep resumes its own runs"),
        (["sweep", "train.seed=1,2,2"], "has a value twice"),
        (["sweep", "train.seed=0,1", "--markdown", "nowhere/x"], "there is no folder 'nowhere'"),
    ],
)
def test_what_is_wrong_for_all_is_one_line_before_anything_runs(arguments, expected, tmp_path: Path, capsys) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if not line.startswith("runs are in ")]
    assert line.startswith("error: ")
    assert expected in line
    assert not captured.out
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_file_of_ones_own_is_swept_over(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("backbone: gru\ntrain: {n_epochs: 1, learning_rate: 0.001}\n")
    tiny = [override for override in TINY if "n_epochs" not in override]
    assert main(["sweep", "--config", "mine.yaml", *tiny, "train.seed=0,1", "--folder", "s"]) == 0
    assert [(row["backbone"], row["seed"]) for row in rows_of(tmp_path / "s")] == [("gru", "0"), ("gru", "1")]
    for file in (tmp_path / "s").glob("*/job.json"):
        assert json.loads(file.read_text())["config"]["train"]["learning_rate"] == 0.001


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_help_lists_choices_and_keys(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert re.search(r"^backbone: attention, .*lru", text, re.MULTILINE)
    assert "recurrent_mode: episode" in text
    assert ("--jobs" in text) == (command == "sweep")


def test_jobs_without_joblib_name_the_extra(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_joblib_launcher", None)  # importing it fails
    assert main(["sweep", "train.seed=0,1", "--jobs", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: --jobs needs more packages: pip install 'cyborg-torchrl[sweep]'"


@pytest.mark.slow
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
    command = [sys.executable, "-m", "cyborg_torchrl", "sweep", *TINY, "backbone=outside", "backbone.width=4,6"]
    command += ["--jobs", "2", "--folder", "s"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{installed}"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "s")
    assert len(rows) == 2
    assert {row["backbone"] for row in rows} == {"outside"}
    assert not any(row["error"] for row in rows)
    assert sorted(os.listdir(tmp_path)) == ["installed", "s"]
