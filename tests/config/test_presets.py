"""Presets: which one is chosen, what it fills, and what it leaves alone."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import pytest
from omegaconf import OmegaConf
from torchrl.envs import GymEnv, SerialEnv

from cyborg_torchrl.config import ConfigError, TrainConfig, load_config
from cyborg_torchrl.config.presets import SHOWN, complete, describe_preset, with_general_values
from cyborg_torchrl.registry import environments
from cyborg_torchrl.training.builders import build_env, build_trainer

PENDULUM = ["env=gymnasium", "id=Pendulum-v1", "env.num_envs=4"]
TUNED = {"train.n_epochs": 15, "train.learning_rate": 3e-3, "train.num_minibatches": 8, "train.gae_lambda": 0.0}


def built(*overrides: str):
    cfg = load_config(overrides=overrides)
    build_env(cfg).close()
    return cfg


@pytest.mark.parametrize("task", ["delayed_cue", "distractor_nav"])
def test_memory_tasks_keep_their_tuned_settings(task: str) -> None:
    cfg = load_config(overrides=[f"env={task}"])
    assert cfg.preset == "memory_task"
    assert cfg.train.recurrent_mode == "episode"
    assert {key: OmegaConf.select(cfg, key) for key in TUNED} == TUNED


def test_every_other_environment_gets_general_by_what_it_shows() -> None:
    pendulum, cartpole, grid = built(*PENDULUM), built("env=gymnasium", "id=CartPole-v1"), built("env=minigrid")
    assert {cfg.preset for cfg in (pendulum, cartpole, grid)} == {"general"}
    for cfg in (pendulum, cartpole, grid):
        assert 128 <= cfg.train.n_steps <= 512
        assert 4 <= cfg.train.n_epochs <= 10
        assert 3e-4 <= cfg.train.learning_rate <= 1e-3
        assert cfg.train.recurrent_mode == "tbptt"
    assert pendulum.transforms.normalize_observation
    assert pendulum.transforms.normalize_reward
    assert cartpole.transforms.normalize_observation
    assert not grid.transforms.normalize_observation
    assert pendulum.transforms.noise_steps > 1
    assert cartpole.transforms.noise_steps == 1
    assert grid.train.n_epochs < pendulum.train.n_epochs
    assert pendulum.agent.separate_critic
    assert not grid.agent.separate_critic


class Arm(gymnasium.Env[Any, Any]):
    """An arm with some motors; it is only reset."""

    def __init__(self, num_motors: int) -> None:
        self.observation_space = gymnasium.spaces.Box(-1, 1, (2,))
        self.action_space = gymnasium.spaces.Box(-1, 1, (num_motors,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}


gymnasium.register("CyborgTests/Arm-v0", entry_point=Arm)


@pytest.mark.parametrize(
    ("num_motors", "noise_steps", "gamma", "log_std_init"),
    [(1, 3, 0.99, 0.0), (3, 1, 0.995, -1.0986), (6, 1, 0.995, -1.7918)],
)
def test_several_continuous_actions_explore_with_less_noise_each(
    num_motors: int, noise_steps: float, gamma: float, log_std_init: float
) -> None:
    cfg = built("env=gymnasium", "id=CyborgTests/Arm-v0", f"env.options={{num_motors: {num_motors}}}")
    assert cfg.transforms.noise_steps == noise_steps
    assert cfg.train.gamma == gamma
    assert cfg.agent.log_std_init == pytest.approx(log_std_init, abs=0.01)  # the standard deviations sum to 1


class Quiz(gymnasium.Env):
    """Asks for what it showed: an answer changes nothing that follows."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "is_prediction": True}
    observation_space = gymnasium.spaces.Discrete(3)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, length: int) -> None:
        self.max_episode_steps = length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}


gymnasium.register("CyborgTests/Quiz-v0", entry_point=Quiz)


@pytest.mark.parametrize(("length", "sequence", "window"), [(40, 40, 40), (1000, None, None)])
def test_answers_that_change_nothing_are_trained_with_a_small_discount_on_whole_episodes(length, sequence, window):
    quiz = ["env=gymnasium", "id=CyborgTests/Quiz-v0", f"env.options={{length: {length}}}", "backbone=attention"]
    cfg = built(*quiz)
    assert (cfg.train.gamma, cfg.train.gae_lambda, cfg.train.n_epochs) == (0.5, 0.5, 8)
    assert (cfg.train.n_steps, cfg.train.seq_len) == ((sequence, sequence) if sequence else (128, 64))
    assert cfg.backbone.window == window
    given = built(*quiz, "train.gamma=0.9", "train.n_steps=20", "backbone.window=7")
    assert (given.train.gamma, given.train.n_steps, given.train.seq_len, given.backbone.window) == (0.9, 20, 20, 7)


@pytest.mark.parametrize(("family", "is_prediction"), [("RepeatPrevious", True), ("Battleship", False)])
def test_popgym_knows_which_answers_change_nothing(family: str, is_prediction: bool) -> None:
    pytest.importorskip("popgym")
    cfg = built("env=popgym", f"id=popgym-{family}Easy-v0", "env.num_envs=2")
    assert (cfg.train.gamma == 0.5) is is_prediction


def test_a_given_value_is_never_changed() -> None:
    given = ["train.n_epochs=3", "train.gamma=0.5", "transforms.normalize_reward=false", "encoder.hidden_sizes=[]"]
    cfg = built(*PENDULUM, *given)
    assert cfg.train.n_epochs == 3
    assert cfg.train.gamma == 0.5
    assert cfg.transforms.normalize_reward is False
    assert cfg.encoder.hidden_sizes == []


def test_the_other_preset_can_be_asked_for() -> None:
    assert built(*PENDULUM, "preset=memory_task").train.n_epochs == 15
    assert load_config(overrides=["preset=general"]).train.learning_rate == 1e-3
    with pytest.raises(ConfigError, match=r"unknown preset 'generl'.*general"):
        load_config(overrides=["preset=generl"])


def test_nothing_is_left_open_and_a_second_call_changes_nothing() -> None:
    for overrides in (PENDULUM, ["env=minigrid", "env.num_envs=1"], [*PENDULUM, "env.num_envs=1", "train=burn_in"]):
        cfg = load_config(overrides=overrides)
        with closing(build_env(cfg)) as env:
            assert all(OmegaConf.select(cfg, key) is not None for key in SHOWN)
            before = OmegaConf.to_yaml(cfg)
            complete(cfg, env)
        assert OmegaConf.to_yaml(cfg) == before


def test_one_small_environment_can_train_with_nothing_else_given() -> None:
    cfg = load_config(overrides=["env=gymnasium", "id=CartPole-v1", "env.num_envs=1", "train.total_timesteps=128"])
    trainer = build_trainer(cfg).trainer
    assert next(iter(trainer.run()))["ratio_error"] < 1e-5
    trainer.close()


def test_collectors_that_cannot_share_statistics_do_not_normalise() -> None:
    cfg = built(*PENDULUM, "collector=multi_sync")
    assert not cfg.transforms.normalize_observation
    assert not cfg.transforms.normalize_reward


def test_memory_is_switched_by_one_key_that_changes_nothing_else() -> None:
    with_memory, control = built(*PENDULUM), built(*PENDULUM, "train.recurrent_mode=none")
    keys = [key for key in SHOWN if key != "train.seq_len"]
    values = [{key: OmegaConf.select(cfg, key) for key in keys} for cfg in (with_memory, control)]
    assert values[0] == values[1]


def test_the_line_can_be_copied_into_a_command() -> None:
    cfg = load_config(overrides=PENDULUM)
    with closing(build_env(cfg)) as env:
        line = describe_preset(cfg, env)
    assert line.startswith("preset=general (vector, continuous actions): ")
    assert "\n" not in line
    again = load_config(overrides=[*PENDULUM, *line.partition("): ")[2].split(" ")])
    assert OmegaConf.to_yaml(again) == OmegaConf.to_yaml(cfg)


def test_an_environment_of_the_user_gets_general() -> None:
    environments.register("mine_for_presets")(lambda num_envs=1, device=None, seed=None: None)
    try:
        assert load_config(overrides=["env=mine_for_presets"]).preset == "general"
    finally:
        environments._components.pop("mine_for_presets", None)


def test_a_batch_of_torchrl_that_is_not_running_can_be_asked() -> None:
    def build(num_envs: int = 2, device: None = None, seed: int | None = None) -> SerialEnv:
        return SerialEnv(num_envs, lambda: GymEnv("CartPole-v1", categorical_action_encoding=True))

    environments.register("serial_for_presets")(build)
    try:
        cfg = load_config(overrides=["env=serial_for_presets"])
        build_env(cfg)  # not closed: TorchRL refuses to close a batch that never ran
        assert (cfg.train.n_steps, cfg.train.n_epochs, cfg.train.gamma) == (128, 5, 0.99)
    finally:
        environments._components.pop("serial_for_presets", None)


def test_scripts_get_the_general_values_for_what_they_leave_open() -> None:
    filled = with_general_values(TrainConfig(n_epochs=3))
    assert filled.n_epochs == 3
    assert filled.learning_rate == 1e-3
    assert filled.gamma == 0.99
    optional = {"n_steps", "seq_len", "state_stride", "clip_range_vf", "target_kl", "stop_at"}
    optional |= {"storage", "micro_batch_steps", "cudagraph"}  # by the device
    left = {field.name for field in dataclasses.fields(filled) if getattr(filled, field.name) is None}
    assert left <= optional


@pytest.mark.parametrize(
    ("overrides", "backbone"),
    [
        ([], "lru"),
        (["env=tmaze"], "lru"),
        (["env=gymnasium"], "gru"),
        (["env=gymnasium", "backbone=lstm"], "lstm"),
        (["env=bsuite", "backbone.hidden_size=32"], "gru"),
    ],
)
def test_gru_is_the_backbone_of_all_but_memory_tasks(overrides: list[str], backbone: str) -> None:
    assert load_config(overrides=overrides).backbone.name == backbone


@pytest.mark.parametrize(("more", "backbone"), [("", "gru"), ("backbone: mamba\n", "mamba")])
def test_the_backbone_of_a_file_stays(tmp_path: Path, more: str, backbone: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"env: {{name: gymnasium, id: Pendulum-v1}}\n{more}")
    assert load_config(str(file)).backbone.name == backbone


@pytest.mark.parametrize(("horizon", "window"), [(20, 80), (600, None)])
def test_attention_reads_whole_episodes_of_short_memory_tasks(horizon: int, window: int | None) -> None:
    options = ["env=copy_memory", "env.sequence=30", f"env.horizon={horizon}", "env.num_envs=2"]
    assert built(*options, "backbone=attention").backbone.window == window
    assert built(*options, "backbone=attention", "backbone.window=9").backbone.window == 9
