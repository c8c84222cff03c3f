"""Runs on disk: finished, interrupted, broken, repeated, and failed in a sweep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cyborg_torchrl.memory_benchmarks.report.runs import ReportError, find_runs
from cyborg_torchrl.memory_benchmarks.results import UNFINISHED, Job

WriteRun = Callable[..., Path]


def test_runs_are_found_at_any_depth_and_once(tmp_path: Path, write_run: WriteRun) -> None:
    inner = write_run("a/run0", seed=1, success=0.25)
    write_run("a/run0s/b/run1")
    (inner / "checkpoints").mkdir()
    runs = find_runs([tmp_path, tmp_path / "a", inner])
    assert [run.path.name for run in runs] == ["run0", "run1"]
    assert [(run.status, run.seed, run.score, run.steps, run.measure) for run in runs] == [
        ("finished", 1, 0.25, 400, "success"),
        ("finished", 0, 0.9, 400, "success"),
    ]
    assert runs[0].learning[0].tolist() == [100.0, 200.0, 300.0, 400.0]


def test_a_task_without_success_is_scored_by_its_return(tmp_path: Path, write_run: WriteRun) -> None:
    write_run("run", success=None)
    (run,) = find_runs([tmp_path])
    assert (run.measure, run.score, run.learning[1].tolist()) == ("return", 0.5, [0.2, 0.4, 0.8, 1.0])


@pytest.mark.parametrize("what", ["nothing", "file", "missing"])
def test_a_path_without_runs_is_refused(tmp_path: Path, write_run: WriteRun, what: str) -> None:
    write_run("good/run")
    path = tmp_path / "other"
    if what == "nothing":
        path.mkdir()
    if what == "file":
        path.write_text("")
    with pytest.raises(ReportError, match="other'") as caught:
        find_runs([tmp_path / "good", path])
    assert "\n" not in str(caught.value)


def broken(folder: Path, how: str) -> None:
    summary = folder / "summary.json"
    if how == "no summary":
        summary.unlink()
    elif how == "interrupted":
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"is_interrupted": True}))
    elif how == "half a summary":
        summary.write_text(summary.read_text()[:20])
    elif how == "no configuration":
        (folder / "config.yaml").unlink()
    elif how == "no metrics":
        (folder / "logs" / "metrics.csv").unlink()
    elif how == "metrics of something else":
        (folder / "logs" / "metrics.csv").write_text("update,steps\n1,many\n")
    elif how == "no score":
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"success_rate": float("nan")}))


@pytest.mark.parametrize(
    ("how", "status", "note"),
    [
        ("no summary", "unfinished", "at step 400"),
        ("interrupted", "interrupted", "at step 400"),
        ("half a summary", "broken", "summary.json cannot be read"),
        ("no configuration", "broken", "no config.yaml"),
        ("no metrics", "broken", "no logs/metrics.csv"),
        ("metrics of something else", "broken", "logs/metrics.csv cannot be read"),
        ("no score", "broken", "no score"),
    ],
)
def test_runs_that_do_not_count_say_why(tmp_path: Path, write_run: WriteRun, how: str, status: str, note: str) -> None:
    broken(write_run("run"), how)
    (run,) = find_runs([tmp_path])
    assert (run.status, run.score) == (status, None)
    assert note in run.note


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run("run")
    with (folder / "logs" / "metrics.csv").open("a") as file:
        file.write("5,500,0.9")
    (run,) = find_runs([tmp_path])
    assert run.status == "finished"
    assert run.metrics["steps"].tolist() == [100.0, 200.0, 300.0, 400.0]


def test_a_resumed_run_counts_and_says_so(tmp_path: Path, write_run: WriteRun) -> None:
    manifest = write_run("run") / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"resumed": [{"update": 2}]}))
    (run,) = find_runs([tmp_path])
    assert (run.status, run.score, run.note) == ("finished", 0.9, "Resumed after update 2.")


def test_the_latest_of_a_seed_counts(tmp_path: Path, write_run: WriteRun) -> None:
    write_run("a", success=0.1, started="2026-01-02T00:00:00+00:00")
    write_run("b", success=0.2, started="2026-01-01T00:00:00+00:00")
    write_run("c", success=0.3, learning_rate=1.0)
    broken(write_run("d", success=0.4, started="2026-01-03T00:00:00+00:00"), "no summary")
    runs = find_runs([tmp_path])
    assert [run.status for run in runs] == ["finished", "repeated", "finished", "unfinished"]
    assert [run.score for run in runs] == [0.1, None, 0.3, None]


def test_failed_jobs_of_a_sweep_are_runs_too(tmp_path: Path, write_run: WriteRun) -> None:
    folders = [write_run(f"seed-{seed}", backbone="gru", seed=seed) for seed in (0, 1, 3)]
    for folder in folders[1:]:
        broken(folder, "no summary")
    folders.insert(2, tmp_path / "seed-2")
    for seed, error in enumerate(("", "no memory", "no device", UNFINISHED)):
        config = {"env": {"name": "delayed_cue"}, "backbone": {"name": "gru"}, "train": {"seed": seed}}
        Job({"train.seed": str(seed)}, config, error).write(folders[seed])
    runs = find_runs([tmp_path])
    assert [(run.seed, run.status, run.note) for run in sorted(runs, key=lambda run: run.seed)] == [
        (0, "finished", ""),
        (1, "failed", "Failed: no memory"),
        (2, "failed", "Failed: no device"),
        (3, "unfinished", "No summary.json: it ended, or is, at step 400."),
    ]


def test_a_job_that_did_not_start_is_unfinished(tmp_path: Path) -> None:
    Job({}, {"env": {"name": "delayed_cue"}, "backbone": {"name": "gru"}, "train": {"seed": 4}}).write(tmp_path / "run")
    (run,) = find_runs([tmp_path])
    assert (run.seed, run.status, run.note) == (4, "unfinished", "It did not start.")
