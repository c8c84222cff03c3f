"""Where a run's time goes: seconds of each part in the metrics, and the profiler's table and trace."""

from __future__ import annotations

import csv
import gzip
import json
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cyborg_torchrl.collectors.profiling import PREFIX, part, recorded, timed
from cyborg_torchrl.config import load_config
from cyborg_torchrl.training.experiment import run_experiment
from cyborg_torchrl.training.profile import PARTS, keep_parts, profiled, table

TINY = ["env.horizon=6", "env.num_envs=8", "train.n_epochs=2", "train.num_minibatches=2", "logger.eval_episodes=0"]
NAMES = {name for outer, inner in PARTS.items() for name in (outer, *inner)}


def run(folder: Path, *overrides: str) -> Path:
    options = [*TINY, "logger=quiet", f"logger.base_dir={folder}", "logger.run_name=r", *overrides]
    run_experiment(load_config(overrides=options))
    return folder / "r"


def annotations(trace: Path) -> dict[str, int]:
    """Return how often each part is in a trace."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"].removeprefix(PREFIX) for event in events if event.get("cat") == "user_annotation"]
    return {name: names.count(name) for name in names}


def test_seconds_of_the_parts_are_in_the_metrics(tmp_path: Path) -> None:
    folder = run(tmp_path, "train.total_timesteps=192")
    with (folder / "logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [f"seconds_{name}" for name in ("collect", "advantages", "update")]
    parts = [[float(row[name]) for name in names] for row in rows]
    assert len(rows) == 3
    assert all(value > 0 for row in parts for value in row)
    assert all(float(row["seconds_checkpoint"]) > 0 for row in rows)
    assert sum(map(sum, parts)) <= float(rows[-1]["seconds"])
    between = float(rows[-1]["seconds"]) - float(rows[0]["seconds"])
    assert sum(map(sum, parts[1:])) <= between
    assert not (folder / "profile").exists()


@pytest.mark.parametrize(("collector", "updates", "measured"), [("rollout", 5, 2), ("fused", 3, 2), ("single", 1, 1)])
def test_a_table_and_a_trace(tmp_path: Path, collector: str, updates: int, measured: int) -> None:
    options = [f"train.total_timesteps={64 * updates}", f"collector={collector}", "logger.profile=true"]
    folder = run(tmp_path, *options) / "profile"
    calls = annotations(folder / "trace.json.gz")
    steps = {"policy", "environment", "storage"} if collector != "single" else set()  # TorchRL's has no parts
    assert {name for name in calls if name in NAMES} == NAMES - {"policy", "environment", "storage"} | steps
    assert (calls["collect"], calls["forward"]) == (measured, measured * 2 * 2)
    assert all(calls[name] == measured * 8 for name in steps)  # n_steps of an episode with horizon 6
    text = (folder / "table.txt").read_text()
    assert "Operations of torch" in text
    shares = {
        words[0]: float(words[2].rstrip("%")) for words in map(str.split, text.splitlines()[1:]) if len(words) == 4
    }
    assert shares["collect"] + shares["advantages"] + shares["update"] == pytest.approx(100, abs=0.2)
    assert shares["forward"] + shares["backward"] <= shares["update"]


def test_an_interrupted_profile_is_written(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), profiled(tmp_path, 5) as after_update:
        after_update()
        after_update()
        with part("collect"):
            pass
        raise KeyboardInterrupt
    assert annotations(tmp_path / "trace.json.gz")["collect"] == 1


def test_a_table_of_known_times() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for name, seconds in (("collect", 0.03), ("update", 0.09)):
            with part(name):
                time.sleep(seconds)
    lines = {line.split()[0]: line.split()[1:] for line in table(profiler.key_averages()).splitlines()}
    assert float(lines["collect"][0]) == pytest.approx(0.03, rel=0.5)
    assert float(lines["collect"][1].rstrip("%")) == pytest.approx(25, abs=10)
    assert lines["update"][2] == "1"


def test_a_trace_that_is_too_large_keeps_the_parts(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    with profile(activities=[ProfilerActivity.CPU]) as profiler, part("forward"):
        torch.ones(3) + 1
    profiler.export_chrome_trace(str(path))
    size = path.stat().st_size
    keep_parts(path)
    assert annotations(path)["forward"] == 1
    assert path.stat().st_size < size


def test_without_a_profiler_nothing_is_recorded() -> None:
    def function() -> None:
        pass

    assert recorded("policy", function) is function
    seconds: dict[str, float] = {}
    with timed("collect", seconds):
        time.sleep(0.01)
    assert seconds["collect"] >= 0.01
