"""Malformed configurations: one clear line each, exit code 2, no traceback, and no run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from cyborg_torchrl.training.command import run_command

SHIPPED = "memory_delayed_cue_recurrent"
OVERRIDES = [
    "backbone=gruu", "backbone=", "backbone.hidden_size=-3", "backbone.hidden_size=big",
    "backbone.hidden_size=1.5", "backbone.num_layers=0", "backbone.readout=loud", "backbone.hiden_size=3",
    "memory=ppm", "env=delaid_cue", "env.horizon=-1", "env.cues=1", "env.num_envs=0",
    "env.num_envs=3.7", "env.level=impossible", "env.nothing=1", "+env.extra=1", "~env", "~backbone.name",
    "train=episod", "train.recurrent_mode=burnin", "train.n_epochs=0", "train.n_epochs=abc", "train.gamma=1.5",
    "train.gamma=nan", "train.gae_lambda=-0.1", "train.learning_rate=0", "train.learning_rate=inf",
    "train.num_minibatches=1000", "train.num_minibatches=-1", "train.seed=-1", "train.seed=99999999999999999999",
    "train.device=gpu", "train.device=cuda:99", "train.storage=disk", "train.burn_in=4", "train.seq_len=6",
    "train.total_timesteps=0", "train.clip_range=-0.2", "train.micro_batch_steps=0", "train.lr_schedule=cosin",
    "train.optimizer=adm", "train.weight_decay=0.1", "train.weight_decay=-1", "transforms.reward_scale=0",
    "collector=rol", "collector.cudagraph=true", "transforms.frame_stack=0",
    "transforms.clip_reward=-1",
    "encoder.convolutions=vgg", "encoder.features=0", "encoder.observation_keys=[sound]", "encoder.hidden_sizes=[0]",
    "encoder.autocast=float8", "logger.eval_episodes=-1", "logger.eval_actions=best", "logger.keep_checkpoints=0",
    "logger.checkpoint_every=0", "resume=nowhere", "logger.base_dir=/proc/nowhere", "nonsense", "=3", "a.b.c=",
    "trian.seed=3", "train.seed=[1,2]", "env={horizon: 3", "train.n_steps=-5", "logger.run_name=../elsewhere",
    "logger.run_name=/elsewhere", "train.seq_len=7", "train.sed=1", "env.cues=x",
]  # fmt: skip
FILES = {
    "empty list": "- a\n- b\n",
    "a number": "42\n",
    "not YAML": "env: {horizon: [20\n",
    "tabs": "env:\n\thorizon: 3\n",
    "unknown group": "enviroment: {horizon: 3}\n",
    "unknown key": "train: {epochs: 3}\n",
    "wrong type": "train: {n_epochs: {a: 1}}\n",
    "unknown backbone": "backbone: gruu\n",
    "backbone as list": "backbone: [gru, lstm]\n",
    "anchors to nothing": "train: *there\n",
    "missing interpolation": "train: {seed: '${nothing}'}\n",
    "group chosen twice": "defaults:\n  - env: delayed_cue\n  - env: tmaze\n  - _self_\n",
    "unknown default": "defaults:\n  - config_schema\n  - env: nowhere\n  - _self_\n",
    "bytes": "\x00\x01\x02",
}


def one_line(stderr: str) -> str:
    (line,) = stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in line
    assert len(line) > len("error: ") + 10
    return line


@pytest.mark.parametrize("override", OVERRIDES)
def test_overrides(override: str, tmp_path: Path, capsys) -> None:
    options = [
        "train.total_timesteps=1",
        "logger.progress=false",
        f"logger.base_dir={tmp_path}",
        "env.num_envs=8",
        "env.horizon=3",
    ]
    options += ["logger.eval_episodes=0", override]
    assert run_command(SHIPPED, options) == 2
    one_line(capsys.readouterr().err)
    assert not list(tmp_path.glob("*/manifest.json"))


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(FILES[case])
    options = ["logger.progress=false", f"logger.base_dir={tmp_path}", "env.horizon=3", "logger.eval_episodes=0"]
    assert run_command(str(file), options) == 2
    one_line(capsys.readouterr().err)
    assert not list(tmp_path.glob("*/manifest.json"))


def test_there_are_more_than_fifty() -> None:
    assert len(set(OVERRIDES)) + len(FILES) >= 50
