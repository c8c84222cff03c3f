"""The sweep's cells, and its table, without running anything."""

from __future__ import annotations

import csv

import pytest

from cyborg_torchrl import make_env
from cyborg_torchrl.config import load_config
from cyborg_torchrl.memory_benchmarks import sweep
from cyborg_torchrl.memory_benchmarks.arguments import task_overrides


def test_a_task_may_have_an_id() -> None:
    assert task_overrides("n_back") == ["env=n_back"]
    assert task_overrides("bsuite:memory_len/10") == ["env=bsuite", "env.id=memory_len/10"]


def test_a_cell_is_a_configuration() -> None:
    cell = sweep.Cell("n_back", "gru", None, 2, overrides="env.num_envs=8 train.n_epochs=1", level="hard")
    cfg = load_config(cell.config, cell.changes())
    assert (cfg.env.name, cfg.env.level, cfg.env.num_envs, cfg.backbone.name) == ("n_back", "hard", 8, "gru")
    assert cfg.env.horizon is None
    assert cfg.train.total_timesteps == load_config(overrides=["env=n_back"]).train.total_timesteps, "the task's own"
    given = sweep.Cell("tmaze", "lru", 77, 0, 1234)
    assert load_config(given.config, given.changes()).env.horizon == 77
    assert load_config(given.config, given.changes()).train.total_timesteps == 1234


def test_folders_tell_cells_apart() -> None:
    cells = [
        sweep.Cell("n_back", "gru", None, 0),
        sweep.Cell("n_back", "gru", None, 1),
        sweep.Cell("n_back", "gru", None, 0, level="easy"),
        sweep.Cell("n_back", "gru", 50, 0),
        sweep.Cell("n_back", "gru", None, 0, 100),
        sweep.Cell("n_back", "gru", None, 0, overrides="train=none"),
        sweep.Cell("n_back", "gru", None, 0, config="public_benchmark"),
        sweep.Cell("bsuite:memory_len/10", "gru", None, 0),
    ]
    folders = {cell.folder for cell in cells}
    assert len(folders) == len(cells)
    assert not any("/" in folder or ":" in folder for folder in folders)


def row(cell: sweep.Cell, success: float | None, reward: float = 0.5, error: str = "") -> dict:
    asked = {name: getattr(cell, name) for name in sweep.ASKED}
    measured = {"success_rate": success, "mean_reward": reward, "episode_horizon": 100, "env_steps": 3000}
    return asked | dict.fromkeys(sweep.MEASURED, 1) | measured | {"error": error}


def test_solved_is_what_the_level_says() -> None:
    easy = [sweep.Cell("n_back", "gru", None, seed, level="easy") for seed in range(3)]
    rows = [row(cell, success) for cell, success in zip(easy, (0.84, 0.85, 1.0), strict=True)]
    (line,) = sweep.lines_of(rows, None)
    assert dict(zip(sweep.HEADERS, line, strict=True)) | {
        "target": "0.85",
        "solved": "2/3",
        "seeds": "0.84 0.85 1.00",
    } == dict(zip(sweep.HEADERS, line, strict=True))
    (line,) = sweep.lines_of(rows, 0.9)
    assert "1/3" in line
    assert sweep.target_of(sweep.Cell("n_back", "gru", None, 0, level="extreme")) == 0.6
    assert sweep.target_of(sweep.Cell("delayed_cue", "gru", None, 0)) == 0.95
    assert sweep.target_of(sweep.Cell("bsuite:memory_len/10", "gru", None, 0)) is None


def test_failures_and_returns_are_shown_as_what_they_are() -> None:
    cells = [sweep.Cell("bsuite:memory_len/10", "lru", None, seed, config="public_benchmark") for seed in range(2)]
    (line,) = sweep.lines_of([row(cells[0], None, 0.75), row(cells[1], None, error="no memory")], None)
    shown = dict(zip(sweep.HEADERS, line, strict=True))
    assert (shown["solved"], shown["mean"], shown["seeds"]) == ("-", "0.750", "0.75 failed")
    zero = sweep.Cell("n_back", "lru", None, 0)
    assert "0.000" in sweep.lines_of([row(zero, 0.0, 5.0)], None)[0], "no success is a success of 0, not a return"


def test_finished_cells_are_found_again(tmp_path) -> None:
    cells = [
        sweep.Cell("n_back", "gru", None, 0, level="easy"),
        sweep.Cell("tmaze", "lru", 77, 1, 1234, "train.n_epochs=1"),
        sweep.Cell("n_back", "gru", None, 3),
    ]
    rows = [row(cells[0], 0.5), row(cells[1], 0.5), row(cells[2], None, error="killed")]
    with (tmp_path / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, (*sweep.ASKED, *sweep.MEASURED))
        writer.writeheader()
        writer.writerows(rows)
    assert set(sweep.read_rows(tmp_path / "results.csv")) == set(cells[:2])


@pytest.mark.parametrize("content", ["step,loss\n1,2\n", "no table\n"])
def test_a_file_of_something_else_is_not_written_to(tmp_path, content: str, capsys) -> None:
    output = tmp_path / "other.csv"
    output.write_text(content)
    assert sweep.main(["--tasks", "n_back", "--seeds", "1", "--output", str(output)]) == 2
    assert "was not written by this sweep" in capsys.readouterr().err
    assert output.read_text() == content


@pytest.mark.parametrize("option", ["--output", "--markdown"])
def test_a_folder_is_refused_before_anything_runs(tmp_path, option: str, capsys) -> None:
    try:
        code = sweep.main(["--tasks", "n_back", "--seeds", "1", "--base-dir", str(tmp_path), option, str(tmp_path)])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("override", ["train.seed=3", "backbone=gru", "env=tmaze", "id=CartPole-v1"])
def test_what_the_table_says_is_not_changed_behind_its_back(override: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        sweep.main(["--tasks", "n_back", "--seeds", "1", override])
    assert stopped.value.code == 2
    assert "is the sweep's own to say: use --" in capsys.readouterr().err


def test_a_cell_is_run_once_and_its_overrides_stay_whole(tmp_path, monkeypatch) -> None:
    ran = []
    monkeypatch.setattr(sweep, "run_cell", lambda cell, base_dir: ran.append(cell) or row(cell, 1.0))
    options = ["--tasks", "gymnasium:Pendulum-v1", "gymnasium:Pendulum-v1", "--config", "public_benchmark"]
    spaced = "env.options={g: 5.0}"
    assert sweep.main([*options, "--seeds", "1", "--base-dir", str(tmp_path), spaced, "train.n_epochs=1"]) == 0
    assert len(ran) == 1
    assert ran[0].changes()[-2:] == [spaced, "train.n_epochs=1"]


def test_markdown_has_a_line_for_each_group() -> None:
    rows = [row(sweep.Cell(task, "lru", None, seed), 1.0) for task in ("n_back", "tmaze") for seed in range(2)]
    lines = sweep.markdown(rows).splitlines()
    assert len(lines) == 4
    assert all(line.count("|") == len(sweep.HEADERS) + 1 for line in lines)


def test_make_env_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="unknown environment 'delaid_cue': did you mean 'delayed_cue'"):
        make_env("delaid_cue")
    with pytest.raises(ValueError, match="environment 'n_back' has no option 'horizn': did you mean 'horizon'"):
        make_env("n_back", horizn=3)
    with pytest.raises(ValueError, match="no transform 'previus_action': did you mean 'previous_action'"):
        make_env("n_back", transforms={"previus_action": True})
    with pytest.raises(ValueError, match="frame_stack must be >= 1; got 0"):
        make_env("n_back", transforms={"frame_stack": 0})
    with pytest.raises(ValueError, match="seed must be >= 0; got -1"):
        make_env("n_back", seed=-1)
    env = make_env("n_back", num_envs=3, horizon=4, seed=0, transforms={"previous_action": True})
    assert env.batch_size == (3,)
    assert {"observation", "previous_action", "is_init"} <= set(env.reset().keys())
