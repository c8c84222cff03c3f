"""A new run begins with what another one has learned, and parts of it can be frozen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.registry import backbones
from cyborg_torchrl.training.builders import Training, build_trainer
from cyborg_torchrl.training.checkpoint import CheckpointError, load_checkpoint
from cyborg_torchrl.training.command import run_command
from cyborg_torchrl.training.experiment import run_experiment
from cyborg_torchrl.training.init_from import find_source, load_source, with_trained_memory
from cyborg_torchrl.training.resume import ResumePoint, with_config_of_run

QUIET = ["logger.progress=false", "logger.tensorboard=false", "logger.eval_episodes=0", "train.n_epochs=1"]
CUE = ["env.horizon=5", "env.num_envs=4", "train.num_minibatches=2", "train.total_timesteps=56"]
POLE = [
    "--config", "public_benchmark", "env=gymnasium", "env.id=CartPole-v1", "env.num_envs=2", "env.workers=0",
    "train.n_steps=16", "train.seq_len=8", "train.num_minibatches=2", "train.total_timesteps=64",
    "transforms.normalize_observation=true", "transforms.normalize_reward=true",
]  # fmt: skip
Values = dict[str, torch.Tensor]


def config(base: Path, name: str, *options: str) -> DictConfig:
    given = [*options, *QUIET, f"logger.base_dir={base}", f"logger.run_name={name}"]
    if given[0] == "--config":
        return load_config(given[1], given[2:])
    return load_config(overrides=given)


def train(base: Path, name: str, *options: str) -> Path:
    return Path(run_experiment(config(base, name, *options))["run_dir"])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of delayed cue."""
    return train(tmp_path_factory.mktemp("cue"), "first", *CUE)


@pytest.fixture(scope="module")
def first_pole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with normalisation, too short to finish an episode: it has no best checkpoint."""
    return train(tmp_path_factory.mktemp("pole"), "first", *POLE)


def learned(run: Path, name: str = "best") -> Values:
    return load_checkpoint(run / "checkpoints" / f"{name}.pt")["agent"]


def begun(cfg: DictConfig) -> Training:
    """Return the parts of a new run before its first update."""
    source = find_source(cfg, ResumePoint())
    assert source is not None
    cfg = with_trained_memory(cfg, source, ResumePoint())
    training = build_trainer(cfg)
    load_source(training, cfg, source)
    return training


def equal_parts(one: Values, other: Values) -> dict[str, bool]:
    """Return for each part whether all its entries are equal."""
    parts: dict[str, bool] = {}
    for name, value in one.items():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, True) and torch.equal(value, other[name])
    return parts


@pytest.mark.parametrize(
    "other",
    [
        ["env.num_envs=8"],
        ["env.num_envs=1", "train.num_minibatches=1"],
        ["env.num_envs=2", "env.horizon=20"],
        ["train=tbptt", "train.seq_len=4", "train.n_steps=12"],
        ["train=burn_in", "train.seq_len=4", "train.burn_in=2", "collector=single"],
    ],
    ids=lambda options: " ".join(options),
)
def test_a_run_begins_with_learned_parameters_under_another_configuration(
    other: list[str], first: Path, tmp_path: Path
) -> None:
    training = begun(config(tmp_path, "second", *CUE, *other, f"init_from={first}"))
    assert all(equal_parts(learned(first), training.agent.state_dict()).values())
    assert training.trainer.num_updates == 0
    training.trainer.close()
    second = train(tmp_path, "second", *CUE, *other, f"init_from={first}")
    assert not equal_parts(learned(first), learned(second))["backbone"], "training goes on"
    manifest = json.loads((second / "manifest.json").read_text())
    update = load_checkpoint(first / "checkpoints" / "best.pt")["update"]
    assert manifest["init_from"] == {"checkpoint": str(first / "checkpoints" / "best.pt"), "update": update}
    assert json.loads((second / "summary.json").read_text())["init_from"] == str(first)
    assert json.loads((first / "summary.json").read_text())["init_from"] is None


def test_a_checkpoint_file_is_taken_as_it_is_and_a_folder_without_best_gives_the_last(tmp_path: Path) -> None:
    first = train(tmp_path, "first", *CUE)
    checkpoints = first / "checkpoints"
    for path, taken in ((checkpoints / "update_00000001.pt", "update_00000001"), (first, "last")):
        (checkpoints / "best.pt").unlink(missing_ok=True)
        training = begun(config(tmp_path, "second", *CUE, f"init_from={path}"))
        training.trainer.close()
        assert all(equal_parts(learned(first, taken), training.agent.state_dict()).values())


def test_only_the_chosen_parts_are_loaded(first: Path, tmp_path: Path) -> None:
    fresh = build_trainer(config(tmp_path, "second", *CUE, "train.seed=3"))
    options = [*CUE, "train.seed=3", f"init_from={first}", "init_from.only=[encoder,back*]"]
    training = begun(config(tmp_path, "second", *options))
    for parts in (fresh, training):
        parts.trainer.close()
    agent, loaded = training.agent.state_dict(), learned(first)
    is_loaded = equal_parts(loaded, agent)
    assert is_loaded["encoder"]
    assert is_loaded["backbone"]
    assert not is_loaded["policy_head"]
    is_fresh = equal_parts(fresh.agent.state_dict(), agent)
    assert is_fresh["policy_head"]
    assert is_fresh["value_head"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["observation", "reward"]),
        (["init_from.only=[encoder]"], ["observation"]),
        (["init_from.only=[value_head,policy_head]"], ["reward"]),
        (["init_from.only=[backbone]"], []),
        (["init_from.only=[backbone,env_statistics]"], ["observation", "reward"]),
        (["init_from.statistics=false"], []),
    ],
    ids=str,
)
def test_statistics_come_with_the_parts_that_need_them(
    options: list[str], expected: list[str], first_pole: Path, tmp_path: Path
) -> None:
    training = begun(config(tmp_path, "second", *POLE, "env.num_envs=4", f"init_from={first_pole}", *options))
    training.trainer.close()
    agent, there = training.agent.state_dict(), learned(first_pole, "last")
    counts = {"observation": "env_statistics.observation.0.count", "reward": "env_statistics.reward.count"}
    assert all(there[count] > 8 for count in counts.values())
    assert {name for name, count in counts.items() if torch.equal(agent[count], there[count])} == set(expected)


def test_loaded_statistics_are_used_by_the_environment_and_updated(first_pole: Path, tmp_path: Path) -> None:
    second = train(tmp_path, "second", *POLE, "env.num_envs=4", f"init_from={first_pole}")
    count = "env_statistics.reward.count"
    assert learned(second, "last")[count] == learned(first_pole, "last")[count] + 64


def test_the_optimiser_continues_with_its_moments_and_a_new_learning_rate(first: Path, tmp_path: Path) -> None:
    options = [*CUE, "env.num_envs=8", "train.learning_rate=1e-4", "train.adam_eps=1e-7", f"init_from={first}"]
    there = load_checkpoint(first / "checkpoints" / "best.pt")["trainer"]["optimizer"]["state"]
    training = begun(config(tmp_path, "second", *options, "init_from.optimizer=true"))
    training.trainer.close()
    here = training.trainer.optimizer.state_dict()
    assert all(torch.equal(here["state"][i][key], state[key]) for i, state in there.items() for key in state)
    assert (here["param_groups"][0]["lr"], here["param_groups"][0]["eps"]) == (1e-4, 1e-7)
    training = begun(config(tmp_path, "second", *options))
    training.trainer.close()
    assert not training.trainer.optimizer.state_dict()["state"]


def test_rmsprop_continues_with_its_moments(tmp_path: Path) -> None:
    options = [*CUE, "train.optimizer=rmsprop"]
    first = train(tmp_path, "first", *options)
    there = load_checkpoint(first / "checkpoints" / "best.pt")["trainer"]["optimizer"]["state"]
    training = begun(config(tmp_path, "second", *options, f"init_from={first}", "init_from.optimizer=true"))
    training.trainer.close()
    here = training.trainer.optimizer.state_dict()["state"]
    assert there
    assert all(torch.equal(here[i]["square_avg"], state["square_avg"]) for i, state in there.items())


@pytest.mark.parametrize("name", ["mamba", "pmm", "lru"])
def test_memory_is_as_trained_at_another_horizon_unless_it_is_configured(name: str, tmp_path: Path) -> None:
    first = train(tmp_path, "first", *CUE, f"backbone={name}")
    there = begun(config(tmp_path, "a", *CUE, f"backbone={name}", f"init_from={first}"))
    here = begun(config(tmp_path, "b", *CUE, f"backbone={name}", "env.horizon=500", f"init_from={first}"))
    for training in (there, here):
        training.trainer.close()
    seen, actions = torch.rand(2, 30, 6), torch.zeros(2, 30, dtype=torch.long)
    one, other = (training.agent.evaluate_actions(seen, actions).log_prob for training in (there, here))
    assert torch.equal(one, other)
    second = train(tmp_path, "second", *CUE, f"backbone={name}", "env.horizon=7", f"init_from={first}")
    assert load_config(str(second / "config.yaml")).backbone.max_horizon == 5
    options = [*CUE, f"backbone={name}", "backbone.max_horizon=9", f"init_from={first}"]
    assert load_config(str(train(tmp_path, "third", *options) / "config.yaml")).backbone.max_horizon == 9


def test_a_run_that_began_so_can_be_resumed_without_its_source(tmp_path: Path) -> None:
    first = train(tmp_path, "first", *CUE)
    options = [*CUE, "env.horizon=7", f"init_from={first}", "resume=auto"]
    second = train(tmp_path, "second", *options)
    first.rename(tmp_path / "moved")
    again = run_experiment(config(tmp_path, "second", *options, "train.total_timesteps=112"))
    assert (again["run_dir"], again["total_updates"]) == (str(second), 3)
    assert json.loads((second / "manifest.json").read_text())["resumed"][0]["update"] == 1


def test_resuming_with_other_environments_points_to_init_from(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    best = first / "checkpoints" / "best.pt"
    for source in (first, best):
        assert run_command("memory_delayed_cue_recurrent", [f"resume={source}", "env.num_envs=8"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"init_from={source} instead of resume" in line
        more = ["--config", str(first / "config.yaml"), f"init_from={source}", "env.num_envs=8"]
        assert run_experiment(config(tmp_path, f"next-{source.name}", *more))["num_envs"] == 8


REFUSED = {
    "no such path": (["init_from=nothing"], r"init_from: no checkpoint 'nothing'"),
    "unknown part": (
        ["init_from=PATH", "init_from.only=[encodre]"],
        r"init_from.only: there is no part 'encodre'; known: encoder, backbone, fusion, policy_head, value_head",
    ),
    "other widths": (
        ["init_from=PATH", "encoder.features=9"],
        r"does not fit this run: encoder.module.network.0.weight is \[64, 6\] there and \[9, 6\] here, .*, and \d+ "
        r"more; its configuration is in the config.yaml of its run \(--config\); "
        r"init_from.only=\[policy_head,value_head\] takes the parts that fit\.",
    ),
    "another backbone": (
        ["init_from=PATH", "backbone=gru"],
        r"is missing there and \[192, 64\] here.*init_from.only=\[encoder,fusion,policy_head,value_head\]",
    ),
    "another observation": (["init_from=PATH", "env=n_back"], r"encoder.module.network.0.weight is \[64, 6\] there"),
    "a part of one run alone": (
        ["init_from=PATH", "agent.separate_critic=true", "init_from.only=[critic]"],
        r"critic.0.module.network.0.weight is missing there and \[64, 6\] here",
    ),
    "other statistics": (
        ["init_from=PATH", "transforms.normalize_observation=true"],
        r"env_statistics.observation.0.count is missing there.*or init_from.statistics=false",
    ),
    "no path": (["init_from.only=[encoder]"], r"init_from.only needs init_from=PATH"),
    "optimiser of parts": (
        ["init_from=PATH", "init_from.only=[encoder]", "init_from.optimizer=true"],
        r"init_from.optimizer needs the state of all parameters",
    ),
    "another optimiser": (
        ["init_from=PATH", "init_from.optimizer=true", "train.optimizer=rmsprop"],
        r"has the state of adam, and this run uses rmsprop; use train.optimizer=adam, or init_from.optimizer=false",
    ),
    "optimiser of others": (
        ["init_from=PATH", "init_from.optimizer=true", "train.freeze=[encoder]"],
        r"the optimiser in .* has other parameters than this one \(\d+ there, \d+ here\)",
    ),
}


def test_what_does_not_fit_is_refused_in_one_line(first: Path, tmp_path: Path) -> None:
    for case, (options, message) in REFUSED.items():
        given = [option.replace("PATH", str(first)) for option in options]
        with pytest.raises((ConfigError, CheckpointError), match=message) as error:
            train(tmp_path, "second", *CUE, *given)
        assert "\n" not in str(error.value), case
        assert not (tmp_path / "second").exists(), case


def test_a_yaml_file_may_use_the_short_form(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("init_from: runs/first\ntrain: {seed: 4}\n")
    cfg = load_config(str(file))
    assert (cfg.init_from.path, cfg.init_from.statistics, cfg.train.seed) == ("runs/first", True, 4)
    file.write_text("init_from: {path: runs/first, statistics: false}\n")
    assert not load_config(str(file)).init_from.statistics


@pytest.mark.parametrize("name", backbones.names())
def test_frozen_parts_stay_bit_equal_and_the_others_are_trained(name: str, tmp_path: Path) -> None:
    options = [*CUE, f"backbone={name}", "train.freeze=[encoder,backbone]", "agent.separate_critic=true"]
    training = build_trainer(config(tmp_path, "run", *options))
    before = {key: value.clone() for key, value in training.agent.state_dict().items()}
    for _ in training.trainer.run():
        pass
    training.trainer.close()
    is_equal = equal_parts(before, training.agent.state_dict())
    assert [part for part, equal in is_equal.items() if equal] == ["encoder", "backbone"]
    frozen = {
        id(parameter)
        for part, parameter in training.agent.named_parameters()
        if part.startswith(("encoder.", "backbone."))
    }
    optimised = {id(p) for group in training.trainer.optimizer.param_groups for p in group["params"]}
    assert not frozen & optimised
    assert all(parameter.grad is None for parameter in training.agent.parameters() if id(parameter) in frozen)


def test_a_frozen_encoder_and_a_loaded_one_go_together_and_can_be_resumed(first: Path, tmp_path: Path) -> None:
    options = [*CUE, f"init_from={first}", "init_from.only=[encoder]", "train.freeze=[encoder]", "resume=auto"]
    second = train(tmp_path, "second", *options)
    assert run_experiment(config(tmp_path, "second", *options, "train.total_timesteps=112"))["total_updates"] == 4
    assert equal_parts(learned(first), learned(second, "last"))["encoder"]
    given = [f"resume={second}", "train.freeze=[]"]
    with pytest.raises(ConfigError, match=r"cannot change train.freeze"):
        with_config_of_run(load_config(overrides=given), given)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("[encodr]", r"train.freeze: there is no part 'encodr'; known: encoder, backbone, fusion, policy_head, value_"),
        ("['*']", r"train.freeze: all parameters are frozen, so there is nothing to train"),
    ],
)
def test_a_mistake_in_freeze_is_reported(freeze: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build_trainer(config(tmp_path, "run", *CUE, f"train.freeze={freeze}"))


def test_auto_continues_a_run_that_is_older_than_these_options(tmp_path: Path) -> None:
    fewer = "train.total_timesteps=28"
    first = train(tmp_path, "first", *CUE, fewer)
    written = OmegaConf.load(first / "config.yaml")
    del written["init_from"], written.train["freeze"]
    OmegaConf.save(written, first / "config.yaml")
    assert run_experiment(config(tmp_path, "first", *CUE, "resume=auto"))["total_updates"] == 2
