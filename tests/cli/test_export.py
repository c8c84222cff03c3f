"""The command, and the examples that load what it wrote where this package cannot be imported."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cyborg_torchrl.cli import export
from cyborg_torchrl.cli.main import main
from cyborg_torchrl.training.loading import load_agent

pytestmark = pytest.mark.usefixtures("unchecked_shapes")
EXAMPLES = Path(__file__).parents[2] / "examples"
WITHOUT = """
import runpy, sys
for name in {blocked}:
    sys.modules[name] = None  # importing it fails
sys.argv = [{script!r}, {file!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


def actions_of_example(script: str, file: Path, *blocked: str) -> list[int]:
    """What an example prints in a process in which some packages cannot be imported."""
    code = WITHOUT.format(blocked=list(blocked), script=str(EXAMPLES / script), file=str(file))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [ast.literal_eval(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_it_writes_what_the_examples_load(
    kind: str, save_trained: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    checkpoint = save_trained("backbone=pmm", "env.horizon=10")
    file = tmp_path / ("agent.onnx" if kind == "onnx" else "agent.pt2")
    assert main(["export", str(checkpoint), "--output", str(file), "--steps", "40"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["format"] == kind
    assert summary["largest"] <= 1e-5
    assert summary["steps"] == 40
    assert file.stat().st_size == summary["bytes"]

    ours = ("cyborg_torchrl", "torchrl", "tensordict")
    if kind == "onnx":
        import numpy as np

        random = np.random.default_rng(0)
        seen = torch.cat([torch.from_numpy(random.random((1, 6)).astype("float32")) for _ in range(8)])
        actions = actions_of_example("deployed_onnx.py", file, *ours, "torch")
    else:
        generator = torch.Generator().manual_seed(0)
        seen = torch.cat([torch.rand((1, 6), generator=generator) for _ in range(8)])
        actions = actions_of_example("deployed_torch.py", file, *ours)
    _, agent, _ = load_agent(checkpoint)
    assert actions == sequence_logits(agent, seen).argmax(-1).tolist()
    assert len(set(actions)) > 1


def sequence_logits(agent, seen):
    """Logits of a sequence by the training path: none of the step's code."""
    columns = [
        agent.evaluate_actions(seen[None], torch.full((1, len(seen)), action)).log_prob[0] for action in range(4)
    ]
    return torch.stack(columns, -1).detach()


def test_what_differs_is_not_written(
    save_trained: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    file = tmp_path / "agent.pt2"
    assert main(["export", str(save_trained("env.horizon=5")), "--output", str(file), "--steps", "3"]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "differs from the agent" in error[0]
    assert not file.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--output", "agent.zip"), "must end in .onnx or .pt2"),
        (("--output", "agent.pt2", "--format", "onnx"), "must end in .onnx with --format onnx"),
        (("--output", "/proc/agent.pt2", "--steps", "3"), "--output: cannot write '/proc/agent.pt2' (No such file"),
        (("--output", "agent.pt2", "backbone.hidden_sice=3"), "did you mean 'backbone.hidden_size'"),
    ],
)
def test_mistakes_end_in_one_line(
    options: tuple[str, ...],
    said: str,
    save_trained: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(save_trained("env.horizon=5")), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert said in error[0]


def test_a_core_that_cannot_be_traced_ends_in_one_line(
    save_trained: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from cyborg_torchrl.cores.gru import GRULayer

    step = GRULayer.step

    def looking(self, x, state):
        return step(self, x if float(x.sum()) > 0 else -x, state)

    checkpoint = save_trained("backbone=gru", "env.horizon=5")
    monkeypatch.setattr(GRULayer, "step", looking)
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "agent.pt2")]) == 1
    assert "cannot be exported" in capsys.readouterr().err.strip().splitlines()[-1]


def test_what_is_trained_in_bfloat16_is_exported_in_float32(
    save_trained: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "agent.pt2"
    checkpoint = save_trained("env.horizon=5", "encoder.autocast=bfloat16")
    assert main(["export", str(checkpoint), "--output", str(file), "--steps", "30"]) == 0
    assert "in float32" in capsys.readouterr().err
    assert file.exists()
