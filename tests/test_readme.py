"""The README's scripts run, and what it says about commands is so."""

import re
from pathlib import Path

import pytest

from cyborg_torchrl.config import load_config
from cyborg_torchrl.registry import backbones
from cyborg_torchrl.training.builders import build_agent, build_env

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"<!-- runs as a test -->\n```python\n(.*?)```", README, re.DOTALL)


def test_there_are_scripts():
    assert len(BLOCKS) == 2


def test_the_torchrl_script_runs(capsys):
    exec(compile(BLOCKS[0], "README.md", "exec"), {"__name__": "readme"})


def test_the_backbone_example_is_a_backbone():
    assert len(BLOCKS[1].splitlines()) <= 40
    backbones._components.pop("leaky_average", None)
    exec(compile(BLOCKS[1], "README.md", "exec"), {"__name__": "readme"})
    cfg = load_config(overrides=["backbone=leaky_average", "backbone.hidden_size=32", "env.horizon=3"])
    env = build_env(cfg)
    agent = build_agent(cfg, env)
    env.append_transform(agent.backbone.make_tensordict_primer())
    rollout = env.rollout(6, agent, break_when_any_done=False)
    assert rollout["memory_state", "hidden"].shape == (64, 6, 32)
    assert rollout["memory_state", "hidden"][:, 2].abs().sum() > 0


@pytest.mark.parametrize("name", backbones.names())
def test_every_backbone_is_in_the_table(name):
    if (Path(__file__).parents[1] / "configs" / "backbone" / f"{name}.yaml").exists():
        assert f"| `{name}` |" in README
