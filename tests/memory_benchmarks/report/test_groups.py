"""Groups of runs that differ only in the seed: members, labels, learning curves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cyborg_torchrl.memory_benchmarks.report.groups import (
    MAX_POINTS,
    build_groups,
    differences,
    different_budgets,
    flatten,
    learning_curve,
    steps_to,
)
from cyborg_torchrl.memory_benchmarks.report.page import build_page
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


def test_labels_tell_apart_groups_of_the_same_backbone(tmp_path: Path, write_run: WriteRun) -> None:
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


def test_groups_are_sorted_by_family_and_level(tmp_path: Path, write_run: WriteRun) -> None:
    ids = ["RepeatPreviousHard", "AutoencodeEasy", "RepeatPreviousEasy", "RepeatPreviousMedium"]
    for name in ids:
        set_env(write_run(name, task="popgym"), id=f"popgym-{name}-v0")
    set_env(write_run("easy"), level="easy")
    groups = build_groups(find_runs([tmp_path]))
    assert [(group.family, group.level) for group in groups] == [
        ("Autoencode", 0),
        ("RepeatPrevious", 0),
        ("RepeatPrevious", 1),
        ("RepeatPrevious", 2),
        ("delayed_cue", 0),
    ]
    # Figures of the POPGym paper.
    assert [group.published and group.published.best for group in groups] == [-0.283, 1.0, 0.789, 0.191, None]


def set_env(folder: Path, **options: object) -> None:
    config = json.loads((folder / "config.yaml").read_text())
    config["env"] |= options
    (folder / "config.yaml").write_text(json.dumps(config))


def set_options(folder: Path, **options: object) -> None:
    config = json.loads((folder / "config.yaml").read_text())
    config["train"] |= options
    (folder / "config.yaml").write_text(json.dumps(config))


def test_labels_leave_out_keys_that_only_some_runs_have(tmp_path: Path, write_run: WriteRun) -> None:
    write_run("new", learning_rate=0.001)
    write_run("fast", learning_rate=0.01)
    set_options(write_run("old", seed=1, learning_rate=0.001), **{f"option_{i}": i for i in range(9)}, empty=None)
    set_options(write_run("older", learning_rate=0.1), first=list(range(100)))
    groups = build_groups(find_runs([tmp_path]))
    assert [group.backbone for group in groups] == [
        "lru, learning_rate=0.001 (missing keys: 1)",
        "lru, learning_rate=0.001 (missing keys: 10)",
        "lru, learning_rate=0.01",
        "lru, learning_rate=0.1",
    ]
    assert groups[0].missing == ["train.first"]


def test_an_option_without_a_value_is_no_difference(tmp_path: Path, write_run: WriteRun) -> None:
    write_run("old")
    set_options(write_run("new", seed=1), option=None)
    set_options(write_run("with", seed=1), option=2)
    groups = build_groups(find_runs([tmp_path]))
    assert [(group.backbone, group.num_seeds) for group in groups] == [
        ("lru, option=2", 1),
        ("lru, option=null", 2),
    ]


def test_labels_are_short_and_never_equal(tmp_path: Path, write_run: WriteRun) -> None:
    for index in range(3):
        same = dict.fromkeys(("clip", "entropy", "gamma"), "x" * 50)
        set_options(write_run(str(index)), **(same | {"zeta": index}))
    set_options(write_run("other"), clip=1, entropy=2, gamma=3, zeta=4)
    names = [group.backbone for group in build_groups(find_runs([tmp_path]))]
    assert len(set(names)) == 4
    assert max(map(len, names)) < 110


def test_seeds_that_did_not_finish_count_as_started(tmp_path: Path, write_run: WriteRun) -> None:
    write_run("a")
    (write_run("b", seed=1) / "summary.json").unlink()
    (group,) = build_groups(find_runs([tmp_path]))
    assert (group.num_seeds, group.scores) == (2, [0.9])


def test_differences_are_from_the_values_that_most_have() -> None:
    configs = [{"a": {"x": 1}, "train": {"seed": 0}}, {"a": {"x": 1}}, {"a": {"x": 2}, "b": {"only": True}}]
    assert differences([flatten(config) for config in configs]) == [{}, {}, {"a.x": "2"}]


def test_a_curve_covers_the_steps_of_all_seeds() -> None:
    line = np.linspace(0.0, 1000.0, 201)
    curve = learning_curve([(line, line * 2.0), (line[20:-20], line[20:-20] * 4.0)])
    assert (len(curve.steps), curve.steps[0], curve.steps[-1]) == (MAX_POINTS, 100.0, 900.0)
    assert curve.scores.point == pytest.approx(curve.steps * 3.0)
    apart = learning_curve([(line[:3], line[:3]), (line[10:], line[10:])])
    assert apart.steps.tolist() == [10.0]
    few = learning_curve([(line[:3], line[:3]), (line[:3], line[:3])])
    assert few.steps.tolist() == line[:3].tolist()


def test_steps_to_a_target_are_the_median_seeds() -> None:
    steps = np.array([1.0, 2.0, 3.0])
    fast, slow, never = (np.array(values) for values in ([0.9, 0.1, 1.0], [0.0, 0.5, 0.9], [0.0, 0.0, 0.0]))
    assert steps_to(0.9, [(steps, fast), (steps, slow), (steps, never)]) == 3.0
    assert steps_to(0.9, [(steps, fast), (steps, never), (steps, never)]) is None
    assert steps_to(0.9, []) is None


def test_different_budgets_are_named(write_run: Callable[..., Path], tmp_path: Path) -> None:
    write_run("memory", total_timesteps=400)
    write_run("far", horizon=100, total_timesteps=900)
    assert different_budgets(build_groups(find_runs([tmp_path]))) == []
    write_run("control", total_timesteps=100, recurrent_mode="none")
    (sentence,) = different_budgets(build_groups(find_runs([tmp_path])))
    assert sentence.startswith("delayed_cue, horizon 10: lru: 400 steps; lru (no memory): 100 steps.")
    assert sentence in build_page(find_runs([tmp_path]), "")
