"""The one command: what it offers, and how it reports mistakes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from cyborg_torchrl.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    modules = {path.stem for path in (ROOT / "cyborg_torchrl" / "cli").glob("*.py")}
    assert modules - {"__init__", "arguments", "main", "playback"} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"    cyborg-torchrl {name} " in text
    assert text.startswith(f"usage: cyborg-torchrl {name} ")
    assert "_schema" not in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "name a command"),
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["train", "--confg=x"], "unrecognized arguments: --confg=x: did you mean '--config'?"),
        (["train", "gru"], "cannot read 'gru': overrides look like key=value"),
        (["evaluate"], "the following arguments are required: CHECKPOINT"),
        (["evaluate", "x", "--episodes", "0"], "argument --episodes: must be a whole number of 1 or more; got '0'"),
        (["check", "--all", "--backbone", "gru"], "not allowed with argument --all"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert not captured.out


def test_ctrl_c_while_a_command_is_imported_is_one_line(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert main(["evaluate", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_module_is_the_same_command() -> None:
    command = [sys.executable, "-m", "cyborg_torchrl", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown command 'nothing'")
