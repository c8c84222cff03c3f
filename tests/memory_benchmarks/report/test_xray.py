"""A look into a trained agent's memory."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cyborg_torchrl.config import load_config
from cyborg_torchrl.cores import PMMCore
from cyborg_torchrl.memory_benchmarks.report.page import xray_section
from cyborg_torchrl.memory_benchmarks.report.runs import find_runs
from cyborg_torchrl.memory_benchmarks.report.xray import look, record_episode
from cyborg_torchrl.training.experiment import run_experiment
from cyborg_torchrl.training.loading import load_agent

HORIZON = 3
SMALL = [
    f"env.horizon={HORIZON}", "env.num_envs=4", "train.total_timesteps=40", "train.n_epochs=1",
    "train.num_minibatches=2", "backbone.hidden_size=8", "encoder.features=8", "logger=quiet",
    "logger.eval_episodes=4",
]  # fmt: skip
PMM = ["memory=pmm", "memory.slots=4", "memory.slot_size=8"]


def train(folder: Path, name: str, *overrides: str) -> Path:
    run_experiment(load_config(overrides=[*SMALL, f"logger.base_dir={folder}", f"logger.run_name={name}", *overrides]))
    return folder / name


def test_addressing_agrees_with_a_step() -> None:
    core = PMMCore(6, slots=5, slot_size=4, num_heads=2, max_horizon=20)
    state = core.initial_state(3)
    for _ in range(4):
        x = torch.randn(3, 6)
        where = core.addressing(x, state)
        y, following = core.step(x, state)
        torch.testing.assert_close(where.read.sum(-1), torch.ones(3, 2))
        read = torch.einsum("brs,bsc->brc", where.read, state["memory"])
        torch.testing.assert_close(core.output(read.flatten(1)), y)
        usage = state["usage"] + where.write - state["usage"] * where.write
        torch.testing.assert_close(following["usage"], core.usage_kept * usage)
        assert where.error is not None
        torch.testing.assert_close(where.error, (x - state["prediction"]).square().mean(-1))
        state = following


def test_an_episode_is_recorded_step_by_step(tmp_path: Path) -> None:
    cfg, agent, _ = load_agent(train(tmp_path, "pmm", *PMM))
    episode = record_episode(cfg, agent)
    steps = HORIZON + 2
    assert episode.is_whole
    assert len(episode.reward) == steps
    assert (episode.reward[:-1] == 0).all()
    assert episode.success == (episode.reward[-1] > 0)
    assert {name: values.shape for name, values in episode.states.items()} == {
        name: (steps, *shape) for name, shape in agent.backbone.core.state_shapes.items()
    }
    (slots,) = episode.slots
    assert slots.read.shape == (steps, 2, 4)
    np.testing.assert_allclose(slots.read.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(slots.usage, episode.states["usage"])
    changed = np.abs(np.diff(episode.states["memory"], axis=0)).sum(-1)
    assert ((changed > 0) == (slots.write[1:] > 0)).all(), "slots change where they are written to"


def test_the_same_episode_is_recorded_again(tmp_path: Path) -> None:
    folder = train(tmp_path, "run")
    first, second = (record_episode(*load_agent(folder)[:2]) for _ in range(2))
    np.testing.assert_array_equal(first.states["hidden"], second.states["hidden"])
    assert not first.slots


def test_a_look_shows_states_slots_gradient_and_drift(tmp_path: Path) -> None:
    folder = train(tmp_path, "pmm", *PMM)
    train(tmp_path, "control", "train=none")
    runs = find_runs([tmp_path])
    xray = look(runs, None)
    assert not isinstance(xray, str)
    assert xray.run.path == folder, "an agent with memory rather than one without"
    section = xray_section(runs, xray)
    assert re.match(r'<a href="#run-2">Run 2: pmm</a>: One fresh episode of 5 steps', section["text"])
    titles = [chart.title for chart in section["charts"]]
    assert titles[0] == "Gradient horizon"
    assert f"reaches {HORIZON + 1} steps back" in section["charts"][0].caption
    assert {"State: hidden", "State: memory", "State: usage", "State: prediction"} <= set(titles)
    assert {"Slot reads, head 1", "Slot reads, head 2", "Slot writes", "Slot usage"} <= set(titles)
    assert titles[-1] == "State drift"
    assert "zero throughout" in section["charts"][-1].caption, "whole episodes start from the initial state"
    assert "gradient horizon" in {row["finding"] for row in section["findings"]}


def test_a_look_leaves_the_agent_as_it_was(tmp_path: Path) -> None:
    cfg, agent, _ = load_agent(train(tmp_path, "pmm", *PMM))
    record_episode(cfg, agent)
    assert all("step" not in vars(module) for module in agent.modules())


def test_an_agent_without_memory_has_a_sentence(tmp_path: Path) -> None:
    folder = train(tmp_path, "control", "train=none")
    xray = look([], folder)
    assert not isinstance(xray, str)
    section = xray_section([], xray)
    assert section["text"].startswith(f"{folder}: This agent has no memory state")
    assert section["findings"] == []


def test_a_checkpoint_that_cannot_be_used_leaves_a_sentence(tmp_path: Path) -> None:
    folder = train(tmp_path, "run")
    (folder / "checkpoints" / "last.pt").write_bytes(b"none")
    sentence = look(find_runs([tmp_path]), None)
    assert isinstance(sentence, str)
    assert "is not a readable checkpoint" in sentence
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        look([], folder)
