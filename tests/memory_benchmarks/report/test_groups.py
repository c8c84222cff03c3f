"""What counts as the same but for the seed, and what groups are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cyborg_torchrl.memory_benchmarks.report.groups import build_groups, differences, flatten
from cyborg_torchrl.memory_benchmarks.report.runs import find_runs

WriteRun = Callable[..., Path]


def test_groups_differ_in_more_than_the_seed(tmp_path: Path, write_run: WriteRun) -> None:
    for seed in range(3):
        write_run(f"lru-{seed}", seed=seed, success=seed / 2)
        write_run(f"gru-{seed}", seed=seed, backbone="gru")
    write_run("far", horizon=100)
    write_run("other", task="n_back")
    groups = build_groups(find_runs([tmp_path]))
    assert [(g.task, g.horizon, g.backbone, len(g.runs)) for g in groups] == [
        ("delayed_cue", 10, "gru", 3),
        ("delayed_cue", 10, "lru", 3),
        ("delayed_cue", 100, "lru", 1),
        ("n_back", 10, "lru", 1),
    ]
    assert groups[1].scores == [0.0, 0.5, 1.0]
    assert (groups[1].target, groups[1].place) == (0.95, "delayed_cue, horizon 10")


def test_names_tell_apart_what_would_be_called_the_same(tmp_path: Path, write_run: WriteRun) -> None:
    write_run("slow", learning_rate=0.001)
    write_run("fast", learning_rate=0.01)
    write_run("control", recurrent_mode="none", learning_rate=0.01)
    write_run("elsewhere", task="n_back", backbone="gru", learning_rate=0.02)
    assert [(g.task, g.backbone) for g in build_groups(find_runs([tmp_path]))] == [
        ("delayed_cue", "lru (no memory)"),
        ("delayed_cue", "lru, learning_rate=0.001"),
        ("delayed_cue", "lru, learning_rate=0.01"),
        ("n_back", "gru"),
    ]


def test_seeds_that_did_not_finish_are_counted_as_begun(tmp_path: Path, write_run: WriteRun) -> None:
    write_run("a")
    (write_run("b", seed=1) / "summary.json").unlink()
    (group,) = build_groups(find_runs([tmp_path]))
    assert (group.seeds, group.scores) == (2, [0.9])


def test_differences_are_from_what_most_have() -> None:
    configs = [{"a": {"x": 1}, "train": {"seed": 0}}, {"a": {"x": 1}}, {"a": {"x": 2}, "b": {"only": True}}]
    assert differences([flatten(config) for config in configs]) == [{}, {}, {"a.x": "2"}]
