"""`torch.compile` of a step, in a fresh process: the compiler cannot trace the shape checks of a test run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cyborg_torchrl

SCRIPT = """
import sys, warnings
import torch
from tensordict import TensorDict
from torchrl.data import Categorical, Composite, Unbounded
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.registry import backbones

core = backbones.get(sys.argv[1])(4, hidden_size=8, learn_initial_state=True)
shapes = core.state_shapes.items()
state = TensorDict({key: torch.randn(3, *shape) for key, shape in shapes}, [3])
is_init = torch.tensor([[False], [True], [False]])
td = TensorDict({"features": torch.randn(3, 4), "observation": torch.randn(3, 5), "is_init": is_init}, [3])
td["memory_state"] = state
encoder = build_encoder(Composite(observation=Unbounded((5,))), batch_dims=0, features=4)
backbone = Backbone(core)
agent = PPOAgent(encoder, backbone, Categorical(3))
critic = agent.get_value_operator()
keys = ["memory_features", *(("next", "memory_state", key) for key in core.state_shapes)]
with torch.no_grad():
    for module, outputs in ((backbone, keys), (critic, ["state_value"])):
        expected = module(td.clone())
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(td.clone())
        for key in outputs:
            torch.testing.assert_close(compiled[key], expected[key], rtol=0, atol=1e-5)
    acted = torch.compile(agent, backend="aot_eager")(td.clone())
    assert acted["action"].shape == (3,)
    torch.testing.assert_close(acted["state_value"], expected["state_value"], rtol=0, atol=1e-5)
print("same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gru", "lru"])
def test_the_step_compiles_to_the_same(name: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(cyborg_torchrl.__file__).parents[1])}
    command = [sys.executable, "-c", SCRIPT, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "same"
