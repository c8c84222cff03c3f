"""A run can be killed at any moment: it resumes without a difference, and every checkpoint is readable."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from cyborg_torchrl.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["env.num_envs=16", "env.horizon=40", "train.n_epochs=2", "train.num_minibatches=4", "logger.progress=false"]
OPTIONS += ["train.total_timesteps=40320", "logger.eval_episodes=0", "logger.tensorboard=false"]  # 60 updates
PHASES = "cuw"
"""Collecting, updating, writing."""
RECORDER = """
import os, sys
from cyborg_torchrl.training.checkpoint import CheckpointFolder
from cyborg_torchrl.training.command import run_command
from cyborg_torchrl.collectors import RolloutCollector
from cyborg_torchrl.training.trainer import PPOTrainer

phases = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def record(kind, name, phase):
    function = getattr(kind, name)
    def recording(*arguments, **options):
        os.write(phases, phase)
        return function(*arguments, **options)
    setattr(kind, name, recording)

record(RolloutCollector, "rollout", b"c")
record(PPOTrainer, "update", b"u")
record(CheckpointFolder, "save", b"w")
sys.exit(run_command("memory_delayed_cue_recurrent", sys.argv[2:]))
"""


def start(folder: Path, name: str) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a run in a new process that records its current phase. Return the process and the record."""
    phases = folder / f"{name}.phases"
    phases.unlink(missing_ok=True)
    options = [*OPTIONS, f"logger.base_dir={folder}", f"logger.run_name={name}", "resume=auto"]
    command = [sys.executable, "-c", RECORDER, str(phases), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE), phases


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a run."""
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr.decode()


def kill_in(phase: str, process: subprocess.Popen[bytes], phases: Path, chance: random.Random) -> str:
    """Kill a run some updates later, as soon as it is in a phase, or shortly after. Return its last phase."""
    updates, deadline = chance.randint(1, 4), time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        seen = phases.read_text() if phases.exists() else ""
        if seen.count(phase) >= updates and seen.endswith(phase):
            break
        time.sleep(0.0002)
    time.sleep(chance.random() * 0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return phases.read_text()[-1]


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_with_bit_identical_parameters(tmp_path) -> None:
    chance = random.Random(time.time_ns())
    finish(start(tmp_path, "whole")[0])
    hit: Counter[str] = Counter()
    for moment in range(10):
        process, phases = start(tmp_path, "killed")
        hit[kill_in(PHASES[moment % 3], process, phases, chance)] += 1
        for path in (tmp_path / "killed" / "checkpoints").glob("*.pt"):
            load_checkpoint(path)  # readable at any moment
    assert sum(hit.values()) == 10
    assert len(hit) >= 2, "the runs are killed in several phases"
    finish(start(tmp_path, "killed")[0])
    whole, killed = (load_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "killed"))
    assert (whole["update"], killed["update"]) == (60, 60)
    for part in ("agent", "trainer"):
        assert_equal(whole[part], killed[part])
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.tmp")), "incomplete files are removed"
    print(f"killed while (c)ollecting, (u)pdating, (w)riting: {dict(hit)}")


def assert_equal(one: object, other: object) -> None:
    """Compare nested content bit for bit."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal(value, other[key])
    elif isinstance(one, (list, tuple)):
        assert isinstance(other, (list, tuple))
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    else:
        assert one == other
