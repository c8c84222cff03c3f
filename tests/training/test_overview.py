"""What a run says at its start, and writes into its manifest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cyborg_torchrl.config import load_config
from cyborg_torchrl.cores.kernels import native
from cyborg_torchrl.training.builders import build_agent, build_env
from cyborg_torchrl.training.experiment import run_experiment
from cyborg_torchrl.training.overview import overview, overview_lines

TINY = ["env.horizon=3", "env.num_envs=8", "train.total_timesteps=1", "train.n_epochs=1", "logger.eval_episodes=0"]


@pytest.mark.parametrize("overrides", [[], ["backbone=mamba_gru"], ["agent.separate_critic=true", "fusion.gate=true"]])
def test_every_parameter_is_counted_once(overrides: list[str]) -> None:
    cfg = load_config(overrides=overrides)
    agent = build_agent(cfg, build_env(cfg))
    sizes = overview(agent)["parameters"]
    assert sum(sizes.values()) == sum(parameter.numel() for parameter in agent.parameters())
    assert ("critic" in sizes) == ("agent.separate_critic=true" in overrides)
    total = sum(sizes.values())
    assert overview_lines(overview(agent))[0].startswith(f"network: {total:,} parameters (encoder {6 * 64}, backbone ")


def test_a_run_says_it_and_its_manifest_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*TINY, "transforms.previous_action=true", f"logger.base_dir={tmp_path}", "logger.run_name=r"]
    run_experiment(load_config(overrides=options))
    shown = capsys.readouterr().err
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert manifest["observations"] == "observation [6] as numbers; previous_action [4] as numbers"
    assert manifest["kernels"] == native.library_name()
    assert all(line in shown for line in overview_lines(manifest))
    assert "observations: observation [6] as numbers; previous_action" in shown


def test_the_library_is_named_by_its_file() -> None:
    name = native.library_name()
    if name is None:
        assert native.library() is None
        return
    assert name in native.CAPABILITIES
    assert (native.FOLDER / f"_native_{name}.so").is_file()


def test_without_a_library_the_cure_is_said() -> None:
    """In another process, where the folder of the libraries is empty."""
    program = (
        "import pathlib, tempfile, cyborg_torchrl.cores.kernels.native as native\n"
        "native.FOLDER = pathlib.Path(tempfile.mkdtemp())\n"
        "native.library.cache_clear()\n"
        "from cyborg_torchrl.training import overview\n"
        "about = {'kernels': native.library_name(), 'parameters': {'encoder': 3}, 'observations': ['a']}\n"
        "print(overview.overview_lines(about)[-1])\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == (
        "kernels: plain torch, which is slower; to build those in C++, reinstall with a C++17 compiler\n"
    )
