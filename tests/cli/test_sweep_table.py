"""The results of a sweep, without training: names of folders, rows, the table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from cyborg_torchrl.cli.sweep import table
from cyborg_torchrl.memory_benchmarks.results import MEASURED, Job, Row, folder_name, target_of, write_rows


def test_folders_tell_runs_apart() -> None:
    runs = [
        {"env": "n_back", "backbone": "gru", "train.seed": "0"},
        {"env": "n_back", "backbone": "gru", "train.seed": "1"},
        {"env": "n_back", "backbone": "gru", "train.seed": "0", "env.level": "easy"},
        {"env": "n_back", "backbone": "gru", "train.seed": "0", "env.horizon": "50"},
        {"env": "n_back", "backbone": "gru", "train.seed": "0", "train": "none"},
        {"env": "bsuite", "env.id": "memory_len/10", "train.seed": "0"},
        {},
    ]
    names = [folder_name(overrides) for overrides in runs]
    assert names[2] == "backbone-gru__env-n_back__env.level-easy__train.seed-0"
    assert len(set(names)) == len(runs)
    assert not any(character in name for name in names for character in "/:=, ")
    assert folder_name(dict(reversed(runs[2].items()))) == names[2], "the order of the command line does not matter"
    long = [folder_name({"env.options": "x" * 300, "train.seed": seed}) for seed in "01"]
    assert long[0] != long[1]
    assert max(map(len, long)) <= 255


def row(success: float | None, *, reward: float = 0.5, error: str = "", **named: Any) -> Row:
    measured = {"success_rate": success, "mean_reward": reward, "horizon": 100, "total_timesteps": 3000}
    fixed = {"task": "n_back", "backbone": "gru", "seed": 0, "target": 0.85}
    return {**fixed, **named, **dict.fromkeys(MEASURED, 1), **measured, "error": error}


def lines_of(rows: list[Row], target: float | None = None) -> list[dict[str, str]]:
    headers, lines = table(rows, target)
    return [dict(zip(headers, line, strict=True)) for line in lines]


def test_solved_is_what_the_level_says() -> None:
    rows = [row(success, seed=seed) for seed, success in enumerate((0.84, 0.85, 1.0))]
    (line,) = lines_of(rows)
    assert line.items() >= {"target": "0.85", "solved": "2/3", "seeds": "0.84 0.85 1.00", "mean": "0.897"}.items()
    assert lines_of(rows, 0.9)[0]["solved"] == "1/3"
    assert target_of({"name": "n_back", "level": "extreme"}) == 0.6
    assert target_of({"name": "delayed_cue"}) == 0.95
    assert target_of({"name": "bsuite", "id": "memory_len/10"}) is None
    assert target_of({"name": "no_such_task"}) is None


def test_intervals_are_students_over_seeds() -> None:
    (line,) = lines_of([row(success, seed=seed) for seed, success in enumerate((0.4, 0.5, 0.6))])
    assert line["95 %"] == "0.252 to 0.748"  # 0.5 +- 4.303 * 0.1 / sqrt(3)
    (line,) = lines_of([row(success, seed=seed) for seed, success in enumerate((0.0, 1.0))])
    assert line["95 %"] == "0.000 to 1.000", "a rate stays in [0, 1]"
    (line,) = lines_of([row(None, reward=reward, seed=seed) for seed, reward in enumerate((10.0, 20.0))])
    assert line["95 %"] == "-48.531 to 78.531"
    assert lines_of([row(0.5)])[0]["95 %"] == "-", "one seed has no interval"


def test_failures_and_returns_are_shown_as_such() -> None:
    named = {"task": "bsuite:memory_len/10", "target": None}
    (line,) = lines_of([row(None, reward=0.75, **named), row(None, seed=1, error="no memory", **named)])
    assert (line["solved"], line["mean"], line["seeds"]) == ("-", "0.750", "0.75 failed")
    assert lines_of([row(0.0, reward=5.0)])[0]["mean"] == "0.000", "no success is a success of 0, not a return"
    (line,) = lines_of([row(None, error="killed")])
    assert (line["solved"], line["mean"], line["seeds"]) == ("0/1", "-", "failed")


def test_columns_are_the_overrides_that_differ() -> None:
    rows = [
        row(1.0, task=task, seed=seed, **{"env.horizon": "20", "train.gamma": gamma})
        for task in ("n_back", "tmaze")
        for gamma in ("0.9", "0.99")
        for seed in range(2)
    ]
    rows[-1]["train"] = "none"
    lines = lines_of(rows)
    assert [(line["task"], line["train.gamma"], line["train"]) for line in lines] == [
        ("n_back", "0.9", ""),
        ("n_back", "0.99", ""),
        ("tmaze", "0.9", ""),
        ("tmaze", "0.99", ""),
        ("tmaze", "0.99", "none"),
    ]
    assert "env.horizon" not in lines[0], "all runs have the same"


def test_results_are_read_from_the_runs(tmp_path: Path) -> None:
    config = {"env": {"name": "tmaze", "level": "hard"}, "backbone": {"name": "lru"}, "train": {"seed": 4}}
    Job({"env": "tmaze", "train.seed": "4", "env.level": "hard"}, config, "").write(tmp_path / "a")
    (tmp_path / "a" / "summary.json").write_text(json.dumps({"success_rate": 0.5, "total_seconds": 3.0}))
    Job({"train.gamma": "2"}, config).write(tmp_path / "b")
    write_rows(tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        finished, unfinished = csv.DictReader(file)
    assert finished.items() >= {"run": "a", "task": "tmaze", "env.level": "hard", "seed": "4", "error": ""}.items()
    assert (finished["success_rate"], finished["train.gamma"], finished["mean_reward"]) == ("0.5", "", "")
    assert (unfinished["run"], unfinished["train.gamma"], unfinished["error"]) == ("b", "2", "not finished")
