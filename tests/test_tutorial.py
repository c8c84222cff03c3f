"""The tutorial's commands and scripts run, one after the other, as a newcomer would run them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from cyborg_torchrl import train

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
BLOCK = re.compile(
    r"^(<!-- not run: [^\n]*-->\n)?```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
TRAIN = re.compile(r"python -m cyborg_torchrl\.train ([^>|]*)(?:> (\S+))?(?: *#.*)?")


def run_commands(text: str) -> None:
    """Runs a block of shell commands; those that only train in this process, which has imported torch already."""
    commands = text.replace("\\\n", "").strip().splitlines()
    if not all(TRAIN.fullmatch(command) for command in commands):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        subprocess.run(["bash", "-euo", "pipefail", "-c", text], env=environment, check=True)
        return
    for command in commands:
        arguments, output = TRAIN.fullmatch(command).groups()
        with Path(output or os.devnull).open("w") as file, redirect_stdout(file if output else sys.stdout):
            assert train.main(shlex.split(arguments, comments=True)) == 0, command


@pytest.mark.slow  # two minutes: it trains
def test_everything_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "tutorial"}
    done = []
    for skipped, language, title, text in BLOCK.findall(TUTORIAL):
        if skipped or language == "text":
            continue
        if title:
            Path(title).write_text(text)
        elif language == "python":
            exec(compile(text, "tutorial.md", "exec"), names)
        else:
            assert language == "bash", "what runs nowhere is marked as text"
            run_commands(text)
        done.append(language)
    assert done.count("python") >= 9
    assert done.count("bash") >= 5
    assert TUTORIAL.split("```text\n")[1].split("```")[0] in capfd.readouterr().out, "what is shown was printed"
    assert set(os.listdir(tmp_path)) == {"everything.yaml", "mine.yaml", "runs", "said.txt"}
