"""The soak: that it passes a sound run, and sees each way of not being one."""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from benchmarks.soak import (
    SHARED_MEMORY,
    Sample,
    findings,
    held_by,
    is_sound,
    main,
    soak,
    still_there,
)

SOUND = {
    "is_flat": True, "grown": [], "processes_left": [], "shared_memory_left": [], "temporary_files_left": [],
    "ended_early": False, "summary": {"is_interrupted": True},
}  # fmt: skip


def samples(own=lambda t: 500.0, files=lambda t: 20, count: int = 100) -> list[Sample]:
    return [Sample(0.6 * t, 900.0 - 5 * t, own(t), files(t), 3, 2) for t in range(1, count + 1)]


def test_what_grows_in_the_warm_up_is_no_finding() -> None:
    found = findings(samples(lambda t: 100.0 * min(t, 10), lambda t: min(t, 9)), minutes=1.0)
    assert found["is_flat"]
    assert found["grown"] == []
    assert found["own_mb"] == {"smallest": 1000.0, "largest": 1000.0, "first": 1000.0, "last": 1000.0}


def test_memory_may_vary_by_five_percent_and_no_more() -> None:
    assert findings(samples(lambda t: 500.0 + 20 * (t % 2)), minutes=1.0)["is_flat"]
    assert findings(samples(lambda t: 500.0 - 200 * (t % 9 == 0)), minutes=1.0)["is_flat"], "it falls for a moment"
    assert not findings(samples(lambda t: 500.0 + 30 * (t % 3 == 0)), minutes=1.0)["is_flat"]
    assert not findings(samples(lambda t: 500.0 + 0.4 * t), minutes=1.0)["is_flat"]


def test_a_leak_of_files_is_told_from_their_coming_and_going() -> None:
    assert findings(samples(files=lambda t: 20 + t % 7), minutes=1.0)["grown"] == []
    assert findings(samples(files=lambda t: 20 + t // 7), minutes=1.0)["grown"] == ["files"]


def test_a_run_without_samples_is_not_sound() -> None:
    assert not findings(samples(count=5), minutes=1.0)["is_flat"]


@pytest.mark.parametrize("name", [name for name in SOUND if name.endswith("left")])
def test_what_is_left_is_a_finding(name: str) -> None:
    assert is_sound(SOUND)
    assert not is_sound({**SOUND, name: ["something"]})
    assert not is_sound({**SOUND, "summary": {"is_interrupted": False}})


@pytest.mark.slow
def test_a_short_soak_of_environment_processes_leaves_nothing(tmp_path: Path) -> None:
    overrides = ["env=gymnasium", "env.id=CartPole-v1", "env.num_envs=4", "env.workers=2", "logger.eval_episodes=0"]
    result = soak("public_benchmark", overrides, minutes=0.1, every=0.2, base_dir=tmp_path)
    assert not result["ended_early"], result["said"]
    assert 100 < result["own_mb"]["smallest"] < result["rss_mb"]["largest"]
    assert result["processes"]["largest"] >= 3, "two of environments and the run itself"
    assert result["processes_left"] == result["shared_memory_left"] == result["temporary_files_left"] == []
    assert result["summary"] is not None, result["said"]
    assert result["summary"]["is_interrupted"]


def test_what_a_run_held_and_is_still_there_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "mapped").write_bytes(b"x" * 4096)
    (tmp_path / "open").write_bytes(b"")
    (tmp_path / "of another program").write_bytes(b"")
    with (tmp_path / "mapped").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
    with (tmp_path / "open").open("w"):
        held = held_by(os.getpid())
    mapped.close()
    assert still_there(tmp_path, held) == [str(tmp_path / "mapped"), str(tmp_path / "open")]
    (tmp_path / "open").rename(tmp_path / "renamed")
    (tmp_path / "mapped").unlink()
    assert still_there(tmp_path, held) == [str(tmp_path / "renamed")]
    assert held_by(2**22 + 1) == set(), "no process has this number"


def test_a_semaphore_is_there_as_long_as_who_made_it() -> None:
    lock = multiprocessing.get_context("spawn").Lock()
    held = held_by(os.getpid())
    made = still_there(SHARED_MEMORY, held)
    assert made
    del lock
    assert set(still_there(SHARED_MEMORY, held)) < set(made)


def test_a_run_that_ends_early_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--minutes", "1", "--every", "1", "--base-dir", str(tmp_path), "train.n_steps=-1"]) == 2
    assert "train.n_steps" in capsys.readouterr().err


def test_processes_that_outlive_the_run_are_found(tmp_path: Path) -> None:
    """The marker is in the environment of whatever a run starts, in whatever session."""
    import subprocess
    import sys

    from benchmarks.soak import MARKER, left_behind

    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    stray = subprocess.Popen(command, env={**os.environ, MARKER: "stray"}, start_new_session=True)
    try:
        found, deadline = left_behind("stray"), time.monotonic() + 20
        while not found and time.monotonic() < deadline:  # a new process has its environment only after `exec`
            found = left_behind("stray")
        assert found == [" ".join(command)]
    finally:
        stray.kill()
        stray.wait()
    assert left_behind("stray") == []
    assert json.dumps(left_behind("other")) == "[]"
