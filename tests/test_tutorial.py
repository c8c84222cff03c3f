"""The tutorial's commands and scripts run one after the other, as a newcomer would run them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from cyborg_torchrl.cli.main import main

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
BLOCK = re.compile(
    r"^(<!-- not run: [^\n]*-->\n)?```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
COMMAND = re.compile(r"cyborg-torchrl ((?:train|sweep) [^>|]*)(?:> (\S+))?(?: *#.*)?")


def run_commands(text: str) -> None:
    """Run a block of shell commands. Training commands run in this process, which has imported torch already."""
    commands = text.replace("\\\n", "").strip().splitlines()
    if not all(COMMAND.fullmatch(command) for command in commands):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        subprocess.run(["bash", "-euo", "pipefail", "-c", text], env=environment, check=True)
        return
    for command in commands:
        arguments, output = COMMAND.fullmatch(command).groups()
        with Path(output or os.devnull).open("w") as file, redirect_stdout(file if output else sys.stdout):
            assert main(shlex.split(arguments, comments=True)) == 0, command


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
            assert language == "bash", "blocks that run nowhere are marked as text"
            run_commands(text)
        done.append(language)
    assert done.count("python") >= 9
    assert done.count("bash") >= 5
    assert TUTORIAL.split("```text\n")[1].split("```")[0] in capfd.readouterr().out, "the page shows the printed text"
    assert set(os.listdir(tmp_path)) == {"everything.yaml", "mine.yaml", "runs", "error.txt"}
