"""Resumed runs end with the results of uninterrupted runs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from cyborg_torchrl.cli.main import main
from cyborg_torchrl.collectors import RolloutCollector
from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.training.checkpoint import CheckpointError, CheckpointFolder, load_checkpoint, save_checkpoint
from cyborg_torchrl.training.command import run_command
from cyborg_torchrl.training.experiment import run_experiment
from cyborg_torchrl.training.optimizer_step import OptimizerStep
from cyborg_torchrl.training.resume import find_run
from cyborg_torchrl.training.run_folder import RunFolder, lock_run
from cyborg_torchrl.training.trainer import PPOTrainer

SHORT = ["env.num_envs=4", "env.horizon=5", "train.n_epochs=2", "train.num_minibatches=2", "logger.progress=false"]
SHORT += ["logger.tensorboard=false", "logger.eval_episodes=0", "train.total_timesteps=140"]  # five updates of 28 steps
CASES = {
    "lru": ["train.n_steps=7"],
    "mid_episode": ["train.n_steps=5", "train=tbptt", "train.seq_len=5", "train.total_timesteps=100"],
    "mamba": ["backbone=mamba", "train.n_steps=7"],
    "pmm": ["memory=pmm", "train.n_steps=7"],
    "transforms": [
        "env=gymnasium", "env.id=CartPole-v1", "train.n_steps=7", "transforms.normalize_observation=true",
        "transforms.normalize_reward=true", "transforms.frame_stack=2", "transforms.previous_action=true",
    ],
    "processes": ["env=gymnasium", "env.id=CartPole-v1", "env.workers=2", "train.n_steps=7"],
    "fused": ["collector=fused", "train.n_steps=7"],
    "single": ["collector=single", "train.n_steps=7"],
    "permuted_copy": ["env=permuted_copy", "train.n_steps=5", "train.total_timesteps=100"],
}  # fmt: skip


class Killed(BaseException):
    """The end of the process."""


def config(folder: Path, name: str, *more: str):
    env = [part for part in more if part.startswith("env=")]
    rest = [part for part in (*SHORT, *more) if not part.startswith("env=")]
    is_task = not env or env[0] not in ("env=gymnasium",)
    rest = [part for part in rest if is_task or not part.startswith("env.horizon")]
    return load_config(overrides=[*env, *rest, f"logger.base_dir={folder}", f"logger.run_name={name}"])


def parameters(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "checkpoints" / "last.pt")["agent"]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, cfg, updates: int) -> None:
    """Run until the middle of an update."""
    prepare, step, finished, count = PPOTrainer._prepare, OptimizerStep.__call__, [], []

    def prepared(trainer, rollout):
        finished[:] = [trainer.num_updates]
        return prepare(trainer, rollout)

    def counted(optimizer_step, batch):
        if finished == [updates]:
            count.append(1)
            if len(count) == 2:
                raise Killed
        return step(optimizer_step, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "_prepare", prepared)
        patch.setattr(OptimizerStep, "__call__", counted)
        with pytest.raises(Killed):
            run_experiment(cfg)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_with_the_same_parameters_bit_for_bit(case, tmp_path, monkeypatch) -> None:
    run_experiment(config(tmp_path, "whole", *CASES[case]))
    cfg = config(tmp_path, "cut", *CASES[case], "resume=auto")
    for updates in (2, 3):
        interrupt_after(monkeypatch, cfg, updates)
        torch.manual_seed(99)  # a new process has another random state too
    summary = run_experiment(cfg)
    assert summary["total_updates"] == 5
    whole, cut = parameters(tmp_path / "whole"), parameters(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    rows = []
    for name in ("whole", "cut"):
        with (tmp_path / name / "logs" / "metrics.csv").open() as file:
            timed = ("seconds", "steps_per_second")
            rows.append([{k: v for k, v in row.items() if not k.startswith(timed)} for row in csv.DictReader(file)])
    assert len(rows[0]) == 5
    assert rows[0] == rows[1]
    manifest = json.loads((tmp_path / "cut" / "manifest.json").read_text())
    assert [again["update"] for again in manifest["resumed"]] == [2, 3]


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for update, score in enumerate([0.1, 0.9, 0.5, None], 1):
        folder.save({"update": update}, update, score)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.pt", "last.pt", "update_00000003.pt", "update_00000004.pt"]
    assert load_checkpoint(tmp_path / "best.pt")["update"] == 2
    assert load_checkpoint(tmp_path / "last.pt")["best"] == 0.9
    for name in ("last.pt", "update_00000004.pt"):
        (tmp_path / name).write_bytes(b"half")
    path, content, faults = folder.newest() or pytest.fail("there is one")
    assert (path.name, content["update"], len(faults)) == ("update_00000003.pt", 3, 2)
    (tmp_path / "update_00000003.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.pt is not a readable checkpoint"):
        folder.newest()


def test_auto_continues_the_newest_unfinished_run_of_this_configuration(tmp_path, monkeypatch) -> None:
    def cfg(*more: str):
        return load_config(overrides=[*SHORT, f"logger.base_dir={tmp_path}", "resume=auto", *more])

    assert find_run(cfg()) is None
    interrupt_after(monkeypatch, cfg(), 1)
    (run,) = tmp_path.iterdir()
    assert find_run(cfg("train.seed=1")) is None
    point = find_run(cfg("logger.keep_checkpoints=9", "train.total_timesteps=280"))
    assert point is not None
    assert point.folder == run
    lock = lock_run(run)
    assert lock is not None
    assert find_run(cfg()) is None, "another process trains it"
    with pytest.raises(ConfigError, match="another process"):
        RunFolder(run, cfg(), 1)
    lock.close()
    run_experiment(cfg())
    assert list(tmp_path.iterdir()) == [run]
    assert find_run(cfg()) is None, "it is finished"


def test_a_finished_run_continues_only_for_more_steps(tmp_path) -> None:
    summary = run_experiment(config(tmp_path, "run"))
    again = config(tmp_path, "run", "resume=auto")
    assert run_experiment(again) == summary
    longer = config(tmp_path, "run", "resume=auto", "train.total_timesteps=196")
    assert run_experiment(longer)["total_updates"] == 7


def test_a_path_has_the_configuration_of_its_run(tmp_path, capsys) -> None:
    run_experiment(config(tmp_path, "run", "backbone=gru", "train.n_steps=7"))
    run = tmp_path / "run"
    options = ["train.total_timesteps=168", "logger.progress=false"]
    assert run_command("memory_delayed_cue_recurrent", [f"resume={run}", *options, "train.learning_rate=1e-4"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["backbone"], summary["total_updates"], summary["run_dir"]) == ("gru", 6, str(run))
    # an older checkpoint starts a new run
    older = next(run.glob("checkpoints/update_*4.pt"))
    assert run_command("memory_delayed_cue_recurrent", [f"resume={older}", "logger.run_name=fork", *options]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["total_updates"], summary["run_dir"]) == (6, str(tmp_path / "fork"))
    assert run_command("memory_delayed_cue_recurrent", [f"resume={run}", "env.num_envs=8"]) == 2
    assert "cannot change env.num_envs (it was 4, and is 8 now)" in capsys.readouterr().err
    assert run_command("memory_delayed_cue_recurrent", [f"resume={tmp_path}/nothing"]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_a_run_name_of_another_configuration_is_refused(tmp_path) -> None:
    run_experiment(config(tmp_path, "run"))
    with pytest.raises(ConfigError, match=r"train.gamma \(it was 0.999, and is 0.9 now\)"):
        run_experiment(config(tmp_path, "run", "resume=auto", "train.gamma=0.9"))


def test_an_incomplete_line_of_metrics_is_dropped(tmp_path, monkeypatch) -> None:
    cfg = config(tmp_path, "run", "resume=auto")
    interrupt_after(monkeypatch, cfg, 3)
    metrics = tmp_path / "run" / "logs" / "metrics.csv"
    with metrics.open("a") as file:
        file.write("4,112,0.1")
    shutil.copy(tmp_path / "run" / "checkpoints" / "update_00000002.pt", tmp_path / "run" / "checkpoints" / "last.pt")
    run_experiment(cfg)
    with metrics.open() as file:
        assert [row["update"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5"]


def test_a_version_1_checkpoint_resumes_with_new_episodes(tmp_path, monkeypatch, capsys) -> None:
    cfg = config(tmp_path, "run", "resume=auto")
    interrupt_after(monkeypatch, cfg, 2)
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    content = torch.load(last, weights_only=True)
    old = {key: content[key] for key in ("format", "agent", "trainer", "config")}
    torch.save({**old, "version": 1, "rng": content["rng"]["torch"]}, last)
    assert run_experiment(cfg)["total_updates"] == 5
    assert "begin new episodes" in capsys.readouterr().err


def test_options_of_older_versions_are_ignored_with_one_warning(tmp_path, monkeypatch, caplog, capsys) -> None:
    """Runs of an older version have `collector.groups`, and perhaps `collector=overlapped`."""
    cfg = config(tmp_path, "run", "resume=auto")
    interrupt_after(monkeypatch, cfg, 2)
    run = tmp_path / "run"
    written = yaml.safe_load((run / "config.yaml").read_text())
    written["collector"] |= {"groups": 2, "is_graphed": False, "name": "overlapped"}
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    for path in run.glob("checkpoints/*.pt"):
        content = load_checkpoint(path)
        content["config"]["collector"] |= {"groups": 2, "is_graphed": False, "name": "overlapped"}
        save_checkpoint(path, content)
    assert main(["evaluate", str(run), "--episodes", "4"]) == 0
    assert run_command("memory_delayed_cue_recurrent", [f"resume={run}", "train.total_timesteps=84"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["total_updates"] == 3
    assert run_experiment(cfg)["total_updates"] == 5
    warnings = [record.getMessage() for record in caplog.records if "older version" in record.getMessage()]
    assert len(warnings) == 1
    assert "collector.groups is ignored" in warnings[0]


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys) -> None:
    save = CheckpointFolder.save

    def full(folder, content, update, score):
        if update == 3:
            raise OSError(28, "No space left on device")
        save(folder, content, update, score)

    monkeypatch.setattr(CheckpointFolder, "save", full)
    options = [*SHORT, f"logger.base_dir={tmp_path}", "logger.run_name=run"]
    assert run_command("memory_delayed_cue_recurrent", options) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "No space left on device" in line
    assert "resume=" in line
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["update"] == 2


def test_a_run_resumes_after_a_smaller_total(tmp_path, monkeypatch) -> None:
    cfg = config(tmp_path, "run", "resume=auto")
    interrupt_after(monkeypatch, cfg, 3)
    short = run_experiment(config(tmp_path, "run", "resume=auto", "train.total_timesteps=56"))
    assert (short["total_updates"], short["total_timesteps"], short["is_interrupted"]) == (3, 84, False)
    almost = run_experiment(config(tmp_path, "run", "resume=auto", "train.total_timesteps=111"))
    assert almost["total_updates"] == 3, "111 steps are too few for another update"
    assert run_experiment(cfg)["total_updates"] == 5


def test_a_copied_run_resumes_in_its_new_folder(tmp_path) -> None:
    run_experiment(config(tmp_path, "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    again = run_experiment(config(tmp_path, "copy", f"resume={tmp_path / 'copy'}"))
    assert again["run_dir"] == str(tmp_path / "copy")


def test_a_checkpoint_of_a_named_run_starts_a_run_in_a_new_folder(tmp_path, capsys) -> None:
    run_experiment(config(tmp_path, "run"))
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    assert run_command("memory_delayed_cue_recurrent", [f"resume={best}", "train.total_timesteps=280"]) == 0
    folder = Path(json.loads(capsys.readouterr().out.splitlines()[-1])["run_dir"])
    assert folder.parent == tmp_path
    assert folder.name.startswith("delayed_cue-lru-s0-")
    name = "logger.run_name=branch"
    assert run_command("memory_delayed_cue_recurrent", [f"resume={best}", "train.total_timesteps=280", name]) == 0
    assert (tmp_path / "branch" / "summary.json").is_file()


def test_an_incomplete_checkpoint_is_reported_once(tmp_path, monkeypatch, caplog) -> None:
    interrupt_after(monkeypatch, config(tmp_path, "run"), 3)
    for name in ("last.pt", "update_00000003.pt"):
        (tmp_path / "run" / "checkpoints" / name).write_bytes(b"PK\x03\x04 and no more")
    assert run_command("memory_delayed_cue_recurrent", [f"resume={tmp_path / 'run'}"]) == 0
    messages = [record.getMessage() for record in caplog.records]
    faults = [message for message in messages if "the one before is taken" in message]
    assert len(faults) == len(set(faults))
    assert any("last.pt is not a readable checkpoint: it is cut off" in message for message in faults)


def test_a_collector_with_a_copy_of_the_parameters_gets_those_of_the_checkpoint(tmp_path, monkeypatch) -> None:
    """It gets them before the first rollout, which workers would otherwise play with the initial parameters."""
    run_experiment(config(tmp_path, "run", "train.n_steps=7", "train.total_timesteps=84"))
    learned, events = parameters(tmp_path / "run"), []
    play = RolloutCollector.rollout

    def share(collector) -> None:
        shared = dict(collector.policy.named_parameters())
        is_learned = all(torch.equal(value, learned[name]) for name, value in shared.items())
        events.append("learned" if is_learned else "other")

    def rollout(collector):
        events.append("rollout")
        return play(collector)

    monkeypatch.setattr(RolloutCollector, "update_policy_weights_", share, raising=False)
    monkeypatch.setattr(RolloutCollector, "rollout", rollout)
    run_experiment(config(tmp_path, "run", "train.n_steps=7", "resume=auto"))
    assert events == ["learned", "rollout", "other", "rollout", "other"]
