"""The README's script runs, and its section on backbones names them all."""

import re
from pathlib import Path

import pytest

from cyborg_torchrl.config import load_config
from cyborg_torchrl.registry import backbones, register_backbone
from cyborg_torchrl.training.builders import build_agent, build_env

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPT = re.compile(r"<!-- runs as a test -->\n```python\n(.*?)```", re.DOTALL)
OURS = {name for name in backbones.names() if backbones.get(name).__module__.startswith("cyborg_torchrl.")}


def test_the_script_runs():
    (script,) = SCRIPT.findall(README)
    exec(compile(script, "README.md", "exec"), {"__name__": "readme"})


def test_the_core_of_the_docs_is_a_backbone():
    """The page on cores of one's own: its core is built by configuration, and its state passes through a rollout."""
    script = SCRIPT.findall((ROOT / "docs/howto/own_backbone.md").read_text())[0]
    assert len(script.splitlines()) <= 40
    names: dict = {"__name__": "page"}
    exec(compile(script, "own_backbone.md", "exec"), names)
    register_backbone("slow_average_of_the_docs")(names["build_slow_average"])
    try:
        overrides = ["backbone=slow_average_of_the_docs", "backbone.hidden_size=32", "env.horizon=3"]
        cfg = load_config(overrides=overrides)
        env = build_env(cfg)
        agent = build_agent(cfg, env)
        env.append_transform(agent.backbone.make_tensordict_primer())
        rollout = env.rollout(6, agent, break_when_any_done=False)
    finally:
        backbones._components.pop("slow_average_of_the_docs")
    assert rollout["memory_state", "hidden"].shape == (64, 6, 32)
    assert rollout["memory_state", "hidden"][:, 2].abs().sum() > 0


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_backbone_is_named(name):
    section = README.split("## Backbones")[1].split("\n## ")[0]
    assert f"`{name}`" in section or f"memory={name}`" in section
